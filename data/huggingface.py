"""Data sets of Hugging Face's ``datasets`` on disk: written by ``save_to_disk``, or Parquet files as on the Hub.

The optional package memory-maps them, so data workers share one copy. It first converts Parquet files, once, into its
own cache, which takes as much disk space as the files; the output of ``save_to_disk`` is read in place.
"""

import contextlib
import glob
import os
from pathlib import Path

from utils import InputError, MissingFileError, printable

from .images import ImageError, ImageSet

SPLITS = {"train": ("train",), "val": ("validation", "val", "valid", "test")}


def is_hub_folder(root: Path) -> bool:
    """Whether a folder holds such a data set."""
    return _is_saved(root) or bool(_parquet(root, "train") or _parquet(root, "val"))


def _is_saved(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()  # the latter: of a single split


def _parquet(root: Path, split: str) -> list[str]:
    for name in SPLITS[split][:3]:  # test files of image sets on the Hub have no labels
        files = sorted(str(path) for path in [*root.glob(f"{name}*.parquet"), *root.glob(f"data/{name}*.parquet")])
        for path in files:
            if not os.path.isfile(path):  # a pipe would be waited for, a broken link passed over
                raise InputError(f"{path} is not a file; copy it there, or remove it")
        if files:
            return files
    return []


class HubDataset(ImageSet):
    """Images and labels of one split; the columns are ``image`` and ``label``, the latter with the class names.

    Args:
        root: a folder written by ``save_to_disk``, or one of Parquet files (``data/train-*.parquet``).
        split: ``"train"`` or ``"val"``.

    Raises:
        MissingFileError: the split or the package is missing.
        InputError: the files are damaged, lack a column, or hold a label that is not one of the classes.
    """

    def __init__(self, root: Path, split: str):
        try:
            import datasets  # optional
        except ImportError as error:
            raise MissingFileError(f"{root} needs a package: pip install datasets ({error})") from None
        self.root, self.split = root, split
        try:
            table = self._open(datasets).with_format(None)
            for column, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
                if not isinstance(table.features.get(column), kind):
                    raise InputError(f"{root}: the {split} split needs a column {column} of the type {kind.__name__}; "
                                     f"its columns are {table.features}. Rename or cast them")
            self.classes = list(table.features["label"].names)
            self.table, self.labels = table.cast_column("image", datasets.Image(decode=False)), list(table["label"])
        except InputError:
            raise
        except Exception as error:  # Arrow's, Parquet's and the package's own have no class in common
            raise InputError(f"{root}: the {split} split cannot be read ({error.__cause__ or error}); download or save "
                             "it again") from error
        for index, label in enumerate(self.labels):
            if label is None or not 0 <= label < len(self.classes):
                raise InputError(f"{self.name(index)} has the label {label}, which is none of the {len(self.classes)} "
                                 "classes; remove images without a label")

    def _open(self, datasets):
        files = [glob.escape(path) for path in _parquet(self.root, self.split)]
        if files and not _is_saved(self.root):
            return datasets.load_dataset("parquet", data_files={"train": files}, split="train")
        splits = _saved(self.root) if _is_saved(self.root) else {}
        for name in SPLITS[self.split]:
            if name in splits:
                return splits[name]
        hint = "; to evaluate on a part of the training images, add --opts DATA.HOLD_OUT 0.2"
        there = ", ".join(splits) or "other Parquet files"
        raise MissingFileError(f"{self.root} has no split {' or '.join(SPLITS[self.split])}; it has {there}"
                               f"{hint if self.split == 'val' else ''}")

    def read(self, index: int) -> bytes:
        image = self.table[int(index)]["image"]
        if image is None or image["bytes"] is None:  # a path could be that of any file
            raise ImageError(f"{self.name(index)} holds no image")
        return image["bytes"]

    def name(self, index: int) -> str:
        return printable(f"{self.root}:{self.split}[{index}]")


def hub_classes(root: Path, split: str) -> list[str]:
    """The names of a split's classes, without opening its images; none if it has none that can be read."""
    with contextlib.suppress(Exception):  # HubDataset says what is wrong
        from datasets import Features
        from pyarrow import parquet

        if _is_saved(root):
            splits = _saved(root)
            features = next(splits[name].features for name in SPLITS[split] if name in splits)
        else:
            features = Features.from_arrow_schema(parquet.read_schema(_parquet(root, split)[0]))
        return list(features["label"].names)
    return []


def _saved(root: Path) -> dict:
    from datasets import load_from_disk

    content = load_from_disk(str(root))
    return content if isinstance(content, dict) else {"train": content}
