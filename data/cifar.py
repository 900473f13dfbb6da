"""CIFAR-10 and CIFAR-100: the official binary version, or torchvision's Python version."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive

from utils import InputError, MissingFileError


@dataclass(frozen=True)
class Cifar:
    """Where the files of one of the two data sets are, and the format of their records."""

    python: type[datasets.CIFAR10]  # torchvision's reader of the Python version
    binary_folder: str
    binary_archive: str
    binary_md5: str  # of the archive
    files: dict[str, dict[str, str]]  # of each split of the binary version, with their MD5s
    names_file: str
    label_bytes: int  # before the 3072 pixel bytes of a record; the last one is the label


CIFAR = {
    "cifar10": Cifar(
        python=datasets.CIFAR10,
        binary_folder="cifar-10-batches-bin",
        binary_archive="cifar-10-binary.tar.gz",
        binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
        files={
            "train": {
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            },
            "val": {"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
        },
        names_file="batches.meta.txt",
        label_bytes=1,
    ),
    "cifar100": Cifar(
        python=datasets.CIFAR100,
        binary_folder="cifar-100-binary",
        binary_archive="cifar-100-binary.tar.gz",
        binary_md5="03b5dce01913d631647c71ecec9e9cb8",
        files={"train": {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
               "val": {"test.bin": "4499cfba6c016c1be1438163640a0898"}},
        names_file="fine_label_names.txt",
        label_bytes=2,
    ),
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
    folder = _binary_folder(cifar, root)
    files = cifar.files["train"] | cifar.files["val"]
    if folder and all(check_integrity(folder / file, md5) for file, md5 in files.items()):
        return
    with contextlib.suppress(RuntimeError):  # some of its files are missing or damaged: unpack it again
        cifar.python(root)
        return
    for file, md5 in ((cifar.binary_archive, cifar.binary_md5), (cifar.python.filename, cifar.python.tgz_md5)):
        path = root / file
        if path.is_file():
            if not check_integrity(path, md5):
                raise InputError(f"{path} is damaged: its MD5 is not {md5}; download it again")
            extract_archive(str(path), str(root))
            return
    if folder:
        return  # half of the binary version, without its archive; read_cifar says which file is wrong
    url = f"{mirror.rstrip('/')}/{cifar.python.filename}" if mirror else cifar.python.url
    try:
        download_and_extract_archive(url, str(root), filename=cifar.python.filename, md5=cifar.python.tgz_md5)
    except Exception as error:  # of the network, the URL, the disk or the archive
        raise MissingFileError(f"{name} could not be downloaded from {url} ({error}); {_wanted(cifar, root)}, or name "
                                "another host of this file with --opts DATA.MIRROR URL") from error


def cifar_folder(path: Path) -> Path:
    """The folder that ``--data-path`` names, which may be one of the archives in it."""
    if path.name.endswith(".tar.gz"):
        return path.parent
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name a folder, or one of the published .tar.gz archives")
    return path


def _binary_folder(cifar: Cifar, root: Path) -> Path | None:
    if (root / cifar.binary_folder).is_dir():
        return root / cifar.binary_folder
    return root if any((root / file).is_file() for file in cifar.files["train"] | cifar.files["val"]) else None


def _wanted(cifar: Cifar, root: Path) -> str:
    return (
        f"by hand: put {cifar.python.filename} (170 MB, MD5 {cifar.python.tgz_md5}, from {cifar.python.url}) or "
        f"{cifar.binary_archive} (170 MB, MD5 {cifar.binary_md5}) into {root}, or unpacked as "
        f"{cifar.python.base_folder}/ or {cifar.binary_folder}/"
    )


def read_cifar(name: str, root: Path, split: str) -> tuple[np.ndarray, list[int], list[str]]:
    """Images uint8 (N, 32, 32, 3), labels and class names of the ``"train"`` or ``"val"`` split of ``name``.

    Reads the binary version if it is in ``root`` (or is ``root``), else the Python version. Both are checked by MD5.

    Raises:
        MissingFileError: neither exists, or a file is missing.
        InputError: a file of the binary version is damaged.
    """
    root, cifar = cifar_folder(root), CIFAR[name]
    folder = _binary_folder(cifar, root)
    if not folder:
        try:
            dataset = cifar.python(root, train=split == "train")
        except RuntimeError:
            raise MissingFileError(f"{name} is not in {root}, or is damaged; {_wanted(cifar, root)}") from None
        return dataset.data, dataset.targets, dataset.classes
    for file in (*cifar.files[split], cifar.names_file):
        path, md5 = folder / file, cifar.files[split].get(file)
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; unpack the binary version into {folder} again, or remove "
                                   "this folder to have the data set downloaded")
        if not check_integrity(path, md5):
            raise InputError(f"{path} is damaged: its MD5 is not {md5}; remove its folder and unpack or download the "
                             "data set again")
    records = np.concatenate([np.fromfile(folder / file, np.uint8) for file in cifar.files[split]])
    records = records.reshape(-1, cifar.label_bytes + 3072)
    pixels = records[:, cifar.label_bytes :].reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
    names = (folder / cifar.names_file).read_text(encoding="utf-8").split()
    return images, records[:, cifar.label_bytes - 1].tolist(), names
