"""Data sets of Hugging Face's ``datasets`` on disk: written by ``save_to_disk``, or Parquet files as on the Hub.

The optional package memory-maps them, so data workers share one copy. It first converts Parquet files, once, into its
own cache, which takes as much disk space as the files; the output of ``save_to_disk`` is read in place.
"""

from pathlib import Path

from utils import InputError, MissingFileError

from .images import EncodedImages, ImageError

SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}


def is_hub_folder(root: Path) -> bool:
    """Whether a folder holds such a data set."""
    return (root / "dataset_dict.json").is_file() or bool(_parquet(root, "train") or _parquet(root, "val"))


def _parquet(root: Path, split: str) -> list[str]:
    for name in SPLITS[split][:2]:  # test files of image sets on the Hub have no labels
        files = sorted(str(path) for path in [*root.glob(f"{name}*.parquet"), *root.glob(f"data/{name}*.parquet")])
        if files:
            return files
    return []


class HubDataset(EncodedImages):
    """Images and labels of one split; the columns are ``image`` and ``label``, the latter with the class names.

    Args:
        root: a folder written by ``save_to_disk``, or one of Parquet files (``data/train-*.parquet``).
        split: ``"train"`` or ``"val"``.

    Raises:
        MissingFileError: the split or the package is missing.
        InputError: the files are damaged, or lack a column.
    """

    def __init__(self, root: Path, split: str):
        try:
            import datasets  # optional
        except ImportError as error:
            raise MissingFileError(f"{root} needs a package: pip install datasets ({error})") from None
        self.root, self.split = root, split
        self.table = self._open(datasets)
        for column, kind in (("image", datasets.Image), ("label", datasets.ClassLabel)):
            if not isinstance(self.table.features.get(column), kind):
                raise InputError(f"{root}: the {split} split needs a column {column} of the type {kind.__name__}; "
                                 f"its columns are {self.table.features}")  # fmt: skip
        self.classes = list(self.table.features["label"].names)
        self.table = self.table.cast_column("image", datasets.Image(decode=False))
        self.labels = list(self.table["label"])
        if min(self.labels, default=0) < 0:
            raise InputError(f"{root}: the {split} split has images without a label (-1)")

    def _open(self, datasets):
        try:
            if (self.root / "dataset_dict.json").is_file():
                splits = datasets.load_from_disk(str(self.root))
                found = next((name for name in SPLITS[self.split] if name in splits), None)
                if found is None:
                    raise MissingFileError(f"{self.root} has no split {' or '.join(SPLITS[self.split])}; it has "
                                            f"{', '.join(splits)}")  # fmt: skip
                return splits[found]
            files = _parquet(self.root, self.split)
            if not files:
                raise MissingFileError(f"{self.root} has no {SPLITS[self.split][0]}*.parquet")
            return datasets.load_dataset("parquet", data_files={"train": files}, split="train")
        except MissingFileError:
            raise
        except Exception as error:  # Arrow's, Parquet's and the package's own have no class in common
            raise InputError(f"{self.root}: the {self.split} split cannot be read ({error}); download it "
                             "again") from error

    def read(self, index: int) -> bytes:
        image = self.table[index]["image"]
        if image is None or image["bytes"] is None:  # a path could be that of any file
            raise ImageError(f"{self.name(index)} holds no image")
        return image["bytes"]

    def name(self, index: int) -> str:
        return f"{self.root}:{self.split}[{index}]"
