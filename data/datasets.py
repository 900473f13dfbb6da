"""One split of each data set as an ``ImageSet``."""

import contextlib
import gzip
import os
import unicodedata
from pathlib import Path

import numpy as np

from utils import InputError, MissingFileError, printable

from .cifar import CIFAR, download_cifar, read_cifar
from .huggingface import HubDataset, hub_classes, is_hub_folder
from .images import ImageError, ImageSet, read_file
from .listing import Names, class_folders, has_images, list_images
from .shards import ShardDataset, find_shards
from .zipped import ZipDataset, read_map

DIGITS_FILE = Path(__file__).parent / "digits" / "digits.csv.gz"
FOLDER_SETS = ("imagenet", "imagefolder", "caltech101")
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


class ArraySet(ImageSet):
    """Images in memory, uint8 (N, H, W, 3), with their labels and the names of the classes."""

    def __init__(self, images: np.ndarray, labels: list[int], classes: list[str]):
        self.images, self.labels, self.classes = images, labels, classes

    def pixels(self, index: int):
        return self.images[index], self.labels[index]


class Subset(ImageSet):
    """Some images of a data set, of which ``chosen`` (N) holds the indices."""

    def __init__(self, images: ImageSet, chosen: np.ndarray):
        self.images, self.chosen, self.classes = images, chosen, images.classes
        self.labels = [images.labels[i] for i in chosen]
        self.names = Names.of(images.names[i] for i in chosen) if len(images.names) else ()

    def pixels(self, index: int):
        return self.images.pixels(self.chosen[index])

    def name(self, index: int) -> str:
        return self.images.name(self.chosen[index])


class FolderDataset(ImageSet):
    """The images below the class folders of one folder; labels follow the sorted names of the classes.

    ``hint`` is added to the error if the folder, which belongs to the data set in ``root``, is missing.

    Raises:
        MissingFileError: a folder is missing or holds no image.
        InputError: images are outside the class folders, or a link leads back to a folder that contains it.
    """

    def __init__(self, root: Path, folder: Path, hint: str = ""):
        self.folder = folder
        if not root.is_dir():
            what = "is a file; unpack it if it is an archive, and" if root.exists() else "does not exist;"
            raise MissingFileError(f"{root} {what} name the folder of the data set{hint}")
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise MissingFileError(
                f"{folder} {what}; {root} must hold train/ and val/ with class folders, or another form of the "
                f"data set (see docs/data.md){_likely_cause(root)}{hint}"
            )
        for entry in os.scandir(folder):
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise MissingFileError(printable(f"{entry.path} is a link to nothing; repair or remove it"))
        stray = has_images(folder)
        if stray:
            raise InputError(f"{stray} is outside the class folders; move it to {folder}/<its class>/")
        self.classes = class_folders(folder)
        if not self.classes:
            raise MissingFileError(f"{folder} holds no class folders; it must hold one folder of images for each class")
        self.names, labels = list_images(folder, self.classes)
        self.labels = labels.tolist()
        filled = set(self.labels)
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty:
            raise MissingFileError(
                f"{folder}: no images in the class folders {_shown(empty)}. Fill these folders or remove them"
            )

    def read(self, index: int) -> bytes:
        try:
            return read_file(self.folder / self.names[index])
        except MissingFileError as error:  # it existed when the folder was listed
            raise ImageError(str(error)) from error

    def name(self, index: int) -> str:
        return printable(str(self.folder / self.names[index]))


def _likely_cause(root: Path) -> str:
    """A likely reason why a split of a data set is missing, for its message."""
    if (root / "train_map.txt").is_file():
        return "; add --zip"
    with contextlib.suppress(OSError):  # folders that may not be read
        for other in (root.parent, *(root / name for name in class_folders(root))):
            if class_folders(split_folder(other, "train")) and class_folders(split_folder(other, "val")):
                return f"; name {other} instead"
        train = class_folders(split_folder(root, "train")) or find_shards(root, "train") or is_hub_folder(root)
        if train or _holds_classes(root):
            return "; to evaluate on a part of the training images, add --opts DATA.HOLD_OUT 0.2"
    return ""


def _holds_classes(root: Path) -> bool:
    """Whether a folder without splits holds class folders; a single folder of images may be a data set's pictures."""
    return sum(bool(has_images(root / name)) for name in class_folders(root)) > 1


def prepare_data(config) -> None:
    """The work to be done once per machine, before the loaders: downloads CIFAR, lists folders, indexes shards.

    Raises:
        MissingFileError, InputError: see ``download_cifar``; other data sets are checked when the loaders open them.
    """
    if config.DATA.DATASET in CIFAR:
        download_cifar(config.DATA.DATASET, data_path(config), config.DATA.MIRROR)
    elif config.DATA.DATASET in FOLDER_SETS and not config.DATA.ZIP_MODE:
        for split in ("train",) if config.DATA.HOLD_OUT else ("train", "val"):
            with contextlib.suppress(InputError):
                _open(config, split)


def build_dataset(config, split: str, rank: int = 0, world_size: int = 1) -> ImageSet:
    """The ``"train"`` or ``"val"`` split of ``DATA.DATASET``, its classes checked.

    With ``DATA.HOLD_OUT`` both are parts of the training set. ``rank`` and ``world_size`` determine the share of a
    zipped data set to cache.

    Raises:
        MissingFileError: files are missing; the message says which and what to do.
        InputError: files are damaged, the classes of the two splits differ, or their number is not
            ``MODEL.NUM_CLASSES``.
    """
    channels = config.MODEL.STRIP_MLP.IN_CHANS
    if channels != 3:
        raise InputError(f"MODEL.STRIP_MLP.IN_CHANS is {channels}, but the data sets hold RGB images; set it to 3")
    images = _open(config, "train" if config.DATA.HOLD_OUT else split, rank, world_size)
    found = len(images.classes)
    if found != config.MODEL.NUM_CLASSES:
        raise InputError(
            f"the data set in {config.DATA.DATA_PATH or DIGITS_FILE.parent} has {found} classes but MODEL.NUM_CLASSES "
            f"is {config.MODEL.NUM_CLASSES}; add --opts MODEL.NUM_CLASSES {found}"
        )
    return hold_out(images, config.DATA.HOLD_OUT, split) if config.DATA.HOLD_OUT else images


def _open(config, split: str, rank: int = 0, world_size: int = 1) -> ImageSet:
    """A whole split."""
    name = config.DATA.DATASET
    if config.DATA.ZIP_MODE and name not in FOLDER_SETS:
        raise InputError(f"DATA.ZIP_MODE is for {', '.join(FOLDER_SETS)}; DATA.DATASET is {name}")
    if name == "digits":
        return ArraySet(*read_digits(split))
    root = data_path(config)
    if name in CIFAR:
        return ArraySet(*read_cifar(name, root, split))
    if config.DATA.ZIP_MODE:
        check_zip_classes(root, config.MODEL.NUM_CLASSES)
        return ZipDataset(root, split, config.MODEL.NUM_CLASSES, config.DATA.CACHE_MODE, rank, world_size,
                          config.DATA.SKIP_BAD_IMAGES)
    hint = f"; run: python split_caltech101.py 101_ObjectCategories {root}" if name == "caltech101" else ""
    return open_images(root, split, hint, config.DATA.HOLD_OUT > 0)


def hold_out(images: ImageSet, share: float, part: str) -> ImageSet:
    """The ``"val"`` part of a training set, a fixed random ``share`` of each class, or the rest, ``"train"``.

    Which images of a class are held out depends only on their number. A class of two images or more is in both parts.
    """
    labels = np.array(images.labels)
    order, ends = np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))
    is_held = np.zeros(len(labels), bool)
    for members in np.split(order, ends[:-1]):
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        is_held[np.random.RandomState(0).permutation(members)[: max(count, 0)]] = True
    if not is_held.any():
        raise InputError("DATA.HOLD_OUT needs a class of two images or more; there is none to evaluate on")
    chosen = np.flatnonzero(is_held if part == "val" else ~is_held)
    if isinstance(images, ArraySet):
        return ArraySet(images.images[chosen], labels[chosen].tolist(), images.classes)
    return Subset(images, chosen)


def data_path(config) -> Path:
    """The data set's folder; raises InputError if ``DATA.DATA_PATH`` is empty."""
    if not config.DATA.DATA_PATH:
        raise InputError(f"DATA.DATA_PATH is empty; name the folder of {config.DATA.DATASET} with --data-path DIR")
    return Path(os.path.expanduser(config.DATA.DATA_PATH))  # unlike Path's, it leaves an unknown user as it is


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split: of its usual names, in any case, the first one with class folders, else the first one."""
    there = {name.lower(): name for name in class_folders(root)}
    folders = [root / there.get(name, name) for name in SPLIT_FOLDERS[split]]
    return min(folders, key=lambda folder: (not class_folders(folder), not folder.is_dir()))


def open_images(root: Path, split: str, hint: str = "", is_held_out: bool = False) -> ImageSet:
    """One split of a data set in the form that ``root`` holds: class folders, tar shards, or Hugging Face's.

    Class folders come first: the archives from which they were unpacked may lie beside them. If validation images will
    be held out, the class folders may be in ``root`` itself.

    Raises:
        MissingFileError, InputError: see ``FolderDataset``, ``ShardDataset``, ``HubDataset``; or the two splits have
            different classes.
    """
    other_split = "val" if split == "train" else "train"
    folder, other = split_folder(root, split), split_folder(root, other_split)
    if class_folders(folder) or class_folders(other):
        images, classes = FolderDataset(root, folder, hint), class_folders(other)
    elif is_held_out and _holds_classes(root):
        return FolderDataset(root, root)
    elif find_shards(root, split):
        return ShardDataset(root, split)
    elif is_hub_folder(root):
        images, classes = HubDataset(root, split), hub_classes(root, other_split)
    else:
        return FolderDataset(root, folder, hint)  # which says what is missing
    if classes and not is_held_out:
        check_same_classes(*(images.classes, classes) if split == "train" else (classes, images.classes), root)
    return images


def check_zip_classes(root: Path, num_classes: int) -> None:
    """Raises InputError if ``train_map.txt`` and ``val_map.txt`` both exist and have different classes."""
    maps = root / "train_map.txt", root / "val_map.txt"
    if all(path.is_file() for path in maps):
        train, val = (read_map(path, num_classes)[2] for path in maps)
        numbers = [str(label) for label in range(num_classes)]
        if train == numbers[: len(train)] or val == numbers[: len(val)]:  # one has no names: compare the labels
            train, val = numbers[: len(train)], numbers[: len(val)]
        check_same_classes(train, val, root)


def check_same_classes(train: list[str], val: list[str], where: Path) -> None:
    """Raises an InputError that names the classes if those of the two splits differ."""
    if train == val:
        return
    faults = [f"{len(missing)} missing from {split} ({_shown(sorted(missing))})"
              for split, missing in (("val", set(train) - set(val)), ("train", set(val) - set(train))) if missing]
    if not faults:
        label = next(label for label in range(len(train)) if train[label] != val[label])
        faults = [f"label {label} is {train[label]} in train and {val[label]} in val"]
    elif len({tuple(sorted(unicodedata.normalize("NFC", name) for name in names)) for names in (train, val)}) == 1:
        faults.append("these names look the same and differ only in their Unicode form, composed (NFC) or decomposed "
                      "(NFD, as macOS writes); rename the folders of one split")
    raise InputError(printable(f"{where}: train and val have different classes: {'; '.join(faults)}"))


def _shown(names: list[str]) -> str:
    return printable(", ".join(names[:10])) + ", ..." * (len(names) > 10)


def read_digits(split: str) -> tuple[np.ndarray, list[int], list[str]]:
    """Images uint8 (N, 8, 8, 3), labels and class names of the bundled digits (see ``digits/README.md``).

    Every fifth image, from the first on, is ``"val"`` (360 images), the rest ``"train"`` (1,437).
    """
    with gzip.open(DIGITS_FILE) as file:
        rows = np.loadtxt(file, dtype=np.int64, delimiter=",")  # 64 pixels in 0..16, row by row, and the label
    is_val = np.arange(len(rows)) % 5 == 0
    rows = rows[is_val if split == "val" else ~is_val]
    gray = (rows[:, :64] * 255 // 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return gray.repeat(3, axis=3), rows[:, 64].tolist(), [str(digit) for digit in range(10)]
