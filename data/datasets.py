"""The data sets. Each has ``classes`` (names by label) and returns ``(RGB PIL image, label)`` for an index."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import InputError

from .cifar import read_cifar
from .folders import FolderDataset, class_folders
from .hub import HubDataset, is_hub_folder
from .listing import list_images
from .shards import ShardDataset, find_shards, read_index
from .zipped import ZipDataset, read_map

DIGITS_FILE = Path(__file__).parent / "digits" / "digits.csv.gz"
FOLDER_SETS = ("imagenet", "imagefolder", "caltech101")


class ArrayDataset(Dataset):
    """Images held in memory.

    Args:
        images: uint8 (N, H, W, 3).
        labels: N integers.
        classes: names, by label.
    """

    def __init__(self, images: np.ndarray, labels: list[int], classes: list[str]):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return Image.fromarray(self.images[index]), self.labels[index]

    def pixels(self, index: int):
        """An image as uint8 (H, W, 3), and its label."""
        return self.images[index], self.labels[index]

    def name(self, index: int) -> str:
        """Empty: these images have no files."""
        return ""


def build_dataset(config, split: str, rank: int = 0, world_size: int = 1) -> Dataset:
    """The ``"train"`` or ``"val"`` split of ``DATA.DATASET``, its classes checked.

    ``rank`` and ``world_size`` determine the share of a zipped data set to cache.

    Raises:
        MissingFileError: files are missing; the message says which and what to do.
        InputError: files are damaged, the classes of the two splits differ, or their number is not
            ``MODEL.NUM_CLASSES``.
    """
    name, num_classes = config.DATA.DATASET, config.MODEL.NUM_CLASSES
    part, split = split, "train" if config.DATA.HOLD_OUT else split
    where = DIGITS_FILE.parent if name == "digits" else data_path(config)
    if config.DATA.ZIP_MODE:
        if name not in FOLDER_SETS:
            raise InputError(f"DATA.ZIP_MODE is for {', '.join(FOLDER_SETS)}; DATA.DATASET is {name}")
        check_zip_classes(where, num_classes)
        dataset = ZipDataset(where, split, num_classes, config.DATA.CACHE_MODE, rank, world_size)
    elif name in FOLDER_SETS:
        hint = f"; run: python split_caltech101.py 101_ObjectCategories {where}" if name == "caltech101" else ""
        dataset = open_images(where, split, hint)
    elif name == "digits":
        dataset = ArrayDataset(*read_digits(split))
    else:
        dataset = ArrayDataset(*read_cifar(name, where, split))
    found = len(dataset.classes)
    if found != num_classes:
        raise InputError(
            f"the data set in {where} has {found} classes but MODEL.NUM_CLASSES is {num_classes}; "
            f"add --opts MODEL.NUM_CLASSES {found}"
        )
    return hold_out(dataset, config.DATA.HOLD_OUT, part) if config.DATA.HOLD_OUT else dataset


def hold_out(dataset: Dataset, share: float, part: str) -> ArrayDataset:
    """The ``"val"`` part of a training set, a fixed random ``share`` of it, or the rest, ``"train"``.

    Raises:
        InputError: the data set is not held in memory.
    """
    if not isinstance(dataset, ArrayDataset):
        raise InputError("DATA.HOLD_OUT is for cifar10, cifar100 and digits; set it to 0 and create a val/ folder")
    order, cut = np.random.RandomState(0).permutation(len(dataset)), round(share * len(dataset))
    chosen = np.sort(order[:cut] if part == "val" else order[cut:])
    return ArrayDataset(dataset.images[chosen], [dataset.labels[i] for i in chosen], dataset.classes)


def data_path(config) -> Path:
    """The data set's folder.

    Raises:
        InputError: ``DATA.DATA_PATH`` is empty.
    """
    if not config.DATA.DATA_PATH:
        raise InputError(f"DATA.DATA_PATH is empty; name the folder of {config.DATA.DATASET} with --data-path DIR")
    return Path(config.DATA.DATA_PATH).expanduser()


def open_images(root: Path, split: str, hint: str = "") -> Dataset:
    """One split of a data set in the form that ``root`` holds: tar shards, Hugging Face's, or class folders.

    Raises:
        MissingFileError, InputError: see ``ShardDataset``, ``HubDataset``, ``FolderDataset``; or the two splits have
            different classes.
    """
    if find_shards(root, split):
        return ShardDataset(root, split)
    if is_hub_folder(root):
        return HubDataset(root, split)
    dataset = FolderDataset(root, split, hint)
    other = class_folders(root / ("val" if split == "train" else "train"))
    if other:
        check_same_classes(*(dataset.classes, other) if split == "train" else (other, dataset.classes), root)
    return dataset


def prepare_listings(root: Path) -> None:
    """Indexes the shards in ``root``, or lists its class folders, once for all processes."""
    for split in ("train", "val"):
        if find_shards(root, split):
            read_index(root, split)
        elif not is_hub_folder(root) and class_folders(root / split):
            list_images(root / split, class_folders(root / split), IMG_EXTENSIONS)


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
    faults = []
    for split, missing in (("val", set(train) - set(val)), ("train", set(val) - set(train))):
        if missing:
            shown = sorted(missing)[:10] + ["..."] * (len(missing) > 10)
            faults.append(f"{len(missing)} missing from {split} ({', '.join(shown)})")
    if not faults and train != val:
        label = next(label for label in range(len(train)) if train[label] != val[label])
        faults.append(f"label {label} is {train[label]} in train and {val[label]} in val")
    if faults:
        raise InputError(f"{where}: train and val have different classes: {'; '.join(faults)}")


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
