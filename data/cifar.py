"""CIFAR-10 and CIFAR-100: the official binary version, or torchvision's Python version."""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive, extract_archive

from utils import InputError, MissingFileError


@dataclass(frozen=True)
class Cifar:
    """Where the files of one of the two data sets are, and the format of their records."""

    python: type[datasets.CIFAR10]  # torchvision's reader of the Python version
    binary_folder: str
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    binary_md5: str  # of the binary version's archive
    label_bytes: int  # before the 3072 pixel bytes of a record; the last one is the label
    names_file: str
    names: tuple[str, ...]  # of the classes, if the file of names is missing


CIFAR = {
    "cifar10": Cifar(
        python=datasets.CIFAR10,
        binary_folder="cifar-10-batches-bin",
        train_files=tuple(f"data_batch_{part}.bin" for part in range(1, 6)),
        val_files=("test_batch.bin",),
        binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
        label_bytes=1,
        names_file="batches.meta.txt",
        names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Cifar(
        python=datasets.CIFAR100,
        binary_folder="cifar-100-binary",
        train_files=("train.bin",),
        val_files=("test.bin",),
        binary_md5="03b5dce01913d631647c71ecec9e9cb8",
        label_bytes=2,
        names_file="fine_label_names.txt",
        names=tuple(str(label) for label in range(100)),
    ),
}
MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
    "test.bin": "4499cfba6c016c1be1438163640a0898",
}


def download_cifar(name: str, root: Path, mirror: str = "") -> None:
    """Prepares ``name`` in ``root``: unpacks an archive if there is one, else downloads the Python version.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder, or one of the two archives in it.
        mirror: URL of a folder that holds the Python version's archive; empty: the original host.

    Raises:
        MissingFileError: the download failed; the message says which file to put where.
        InputError: an archive exists but is not the published one.
    """
    root, cifar = cifar_folder(root), CIFAR[name]
    folder = _binary_folder(name, root)
    if folder and all(_md5(folder / file) == MD5[file] for file in cifar.train_files + cifar.val_files):
        return
    with contextlib.suppress(RuntimeError):  # some of its files are missing or damaged: unpack it again
        cifar.python(root)
        return
    for file, md5 in ((_binary_archive(cifar), cifar.binary_md5), (cifar.python.filename, cifar.python.tgz_md5)):
        path = root / file
        if path.is_file():
            if _md5(path) != md5:
                raise InputError(f"{path} is damaged: its MD5 is {_md5(path)}, expected {md5}; download it again")
            extract_archive(str(path), str(root))
            return
    if folder:
        return  # half of the binary version, without its archive; read_cifar says which file is wrong
    url = f"{mirror.rstrip('/')}/{cifar.python.filename}" if mirror else cifar.python.url
    try:
        download_and_extract_archive(url, str(root), filename=cifar.python.filename, md5=cifar.python.tgz_md5)
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingFileError(f"{name} could not be downloaded from {url} ({error}); {_wanted(name, root)}, or name "
                                "another host of this file with --opts DATA.MIRROR URL") from error  # fmt: skip


def cifar_folder(path: Path) -> Path:
    """The folder that ``--data-path`` names, which may be one of the archives in it."""
    return path.parent if path.name.endswith(".tar.gz") else path


def _binary_archive(cifar: Cifar) -> str:
    return cifar.binary_folder.replace("-batches-bin", "-binary") + ".tar.gz"


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else ""


def read_cifar(name: str, root: Path, split: str) -> tuple[np.ndarray, list[int], list[str]]:
    """Images uint8 (N, 32, 32, 3), labels and class names of the ``"train"`` or ``"val"`` split of ``name``.

    Reads the binary version if it is in ``root`` (or is ``root``), else the Python version. Both are checked by MD5.

    Raises:
        MissingFileError: neither exists, or a file is missing.
        InputError: a file of the binary version is damaged.
    """
    root = cifar_folder(root)
    folder = _binary_folder(name, root)
    if folder:
        return _read_binary(CIFAR[name], folder, split)
    try:
        dataset = CIFAR[name].python(root, train=split == "train")
    except RuntimeError:
        raise MissingFileError(f"{name} is not in {root}, or is damaged; {_wanted(name, root)}") from None
    return dataset.data, dataset.targets, dataset.classes


def _wanted(name: str, root: Path) -> str:
    cifar = CIFAR[name]
    return (
        f"by hand: put {cifar.python.filename} (170 MB, MD5 {cifar.python.tgz_md5}, from {cifar.python.url}) or "
        f"{_binary_archive(cifar)} (170 MB, MD5 {cifar.binary_md5}) into {root}, or unpacked as "
        f"{cifar.python.base_folder}/ or {cifar.binary_folder}/"
    )


def _binary_folder(name: str, root: Path) -> Path | None:
    cifar = CIFAR[name]
    if (root / cifar.binary_folder).is_dir():
        return root / cifar.binary_folder
    return root if any((root / file).is_file() for file in cifar.train_files + cifar.val_files) else None


def _read_binary(cifar: Cifar, folder: Path, split: str):
    parts = []
    for file in cifar.train_files if split == "train" else cifar.val_files:
        path = folder / file
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; unpack the binary version into {folder} again, or remove "
                                   "this folder to have the data set downloaded")  # fmt: skip
        if _md5(path) != MD5[file]:
            raise InputError(f"{path} is damaged: its MD5 is {_md5(path)}, expected {MD5[file]}; remove its folder and "
                             "unpack or download the data set again")  # fmt: skip
        parts.append(np.fromfile(path, np.uint8).reshape(-1, cifar.label_bytes + 3072))
    records = np.concatenate(parts)
    pixels = records[:, cifar.label_bytes :].reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
    names_file = folder / cifar.names_file
    names = names_file.read_text(encoding="utf-8").split() if names_file.is_file() else list(cifar.names)
    return images, records[:, cifar.label_bytes - 1].tolist(), names
