"""Converts an image data set between four forms, and optionally shrinks its images.

    python tools/convert_dataset.py DIR TARGET --to shards --short-side 288

DIR holds the data set in any form that main.py reads. TARGET receives it in the new form, with the same images, labels
and class names in the same order, or nothing if an error occurs:
  folders  train/<class>/*.jpg, val/<class>/*.jpg
  zip      train.zip, train_map.txt, val.zip, val_map.txt, for main.py --zip
  shards   train-0000.tar, ... and classes.txt, WebDataset's layout (.jpg and .cls)
  hub      for load_from_disk of Hugging Face's datasets (pip install datasets)

Images are copied byte for byte, and the result is opened and counted. With --short-side, larger images are resized to
that shorter side (Lanczos) and stored as JPEG of quality 95, so that training decodes fewer pixels. This changes what a
network sees, so report it with your results.
"""

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, one_line_errors, printable

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("source", metavar="DIR", type=Path, help="the data set, in any form")
PARSER.add_argument("target", metavar="TARGET", type=Path, help="an empty or new folder")
PARSER.add_argument("--to", choices=["folders", "zip", "shards", "hub"], required=True, help="the form to write")
PARSER.add_argument("--short-side", type=int, default=0, metavar="N", help="shrink larger images to N pixels")
PARSER.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), metavar="N",
                    help="processes that read and shrink; default: one per core, at most 16")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import contextlib
import functools
import io
import itertools
import multiprocessing
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from data.datasets import check_same_classes, open_images
from data.images import FORMATS, decode
from data.listing import IMAGE_EXTENSIONS, is_system
from data.zipped import ZipDataset

SPLITS = ("train", "val")
SHARD = 1000  # images in a tar
_ANY = 2**31  # classes that a zipped data set may have


class Stored(NamedTuple):
    """An image for the target."""

    name: str  # of its file, unique in its split
    label: int
    data: bytes


def convert(source: Path, target: Path, form: str, short_side: int = 0, workers: int = 1) -> dict[str, int]:
    """Writes the data set in ``source``, of any form, into the empty or new folder ``target``; returns the images in
    each split. Images with a shorter side over ``short_side`` pixels are shrunk to it, unless it is 0.

    Raises:
        InputError: the source or the target cannot be used, or the result reads back as another data set.
    """
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; choose another folder")
    sets = {split: _open(source, split) for split in SPLITS}
    classes = sets["train"].classes
    check_same_classes(classes, sets["val"].classes, source)
    for name in classes:
        if not name or "/" in name or is_system(name) or not name.isprintable() or len(os.fsencode(name)) > 255:
            raise InputError(f"{source}: the class name {name!r:.300} cannot be used as a folder name")
        if classes.count(name) > 1:
            raise InputError(f"{source}: two classes are called {name}; each needs a folder of its own")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as unfinished:
        place = Path(unfinished, "data")
        place.mkdir()
        _WRITERS[form](place, {split: functools.partial(_images, sets[split], split, short_side, workers)
                               for split in SPLITS}, classes)
        for split, dataset in sets.items():
            written = _open(place, split)
            if written.classes != classes or sorted(written.labels) != sorted(dataset.labels):
                raise InputError(f"{source}: {len(dataset)} images of {split} were written as {form}, and "
                                 f"{len(written)} read back; nothing was kept. Please report this")
        for entry in place.iterdir():
            if not is_system(entry.name):  # the index that reading back left
                entry.rename(target / entry.name)
    return {split: len(dataset) for split, dataset in sets.items()}


def _open(source: Path, split: str):
    return ZipDataset(source, split, _ANY) if (source / f"{split}.zip").is_file() else open_images(source, split)


# ---- reading -------------------------------------------------------------------------------------

def _images(dataset, split: str, short_side: int, workers: int) -> Iterator[Stored]:
    """The images of a split, in order."""
    with multiprocessing.Pool(workers) if workers > 1 else contextlib.nullcontext() as pool:
        read_all = functools.partial(pool.imap, chunksize=16) if pool else map
        images = read_all(functools.partial(_read, dataset, short_side), range(len(dataset)))
        yield from tqdm(images, split, len(dataset), unit=" images", disable=None)


def _read(dataset, short_side: int, index: int) -> Stored:
    data, name = dataset.read(index), dataset.name(index)
    image = Image.fromarray(decode(data, name))  # raises InputError, with the image's name, for one that is damaged
    suffix = Path(name.rpartition(":")[2]).suffix.lower()
    shorter = min(image.size)
    if 0 < short_side < shorter:
        size = tuple(max(1, round(side * short_side / shorter)) for side in image.size)
        file, suffix = io.BytesIO(), ".jpg"
        image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
        data = file.getvalue()
    if suffix not in IMAGE_EXTENSIONS:  # Hugging Face's images have no names
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            suffix = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")
    stem = printable(Path(name.rpartition(":")[2]).stem.partition(".")[0]).replace("\\", "_")[:60]  # safe in a text
    return Stored(f"{index:08d}{'' if stem.isdecimal() else '_' + stem}{suffix}", dataset.labels[index], data)


# ---- writing -------------------------------------------------------------------------------------

def _write_folders(target: Path, images: dict, classes: list[str]) -> None:
    for split, read in images.items():
        for name in classes:
            (target / split / name).mkdir(parents=True)
        for image in read():
            (target / split / classes[image.label] / image.name).write_bytes(image.data)


def _write_zip(target: Path, images: dict, classes: list[str]) -> None:
    for split, read in images.items():
        lines = []
        with zipfile.ZipFile(target / f"{split}.zip", "w", zipfile.ZIP_STORED) as archive:
            for image in read():
                member = f"{classes[image.label]}/{image.name}"
                info = zipfile.ZipInfo(member)  # in 1980, so that the same images give the same bytes
                info.external_attr = 0o644 << 16
                archive.writestr(info, image.data)
                lines.append(f"{member}\t{image.label}\n")
        (target / f"{split}_map.txt").write_text("".join(lines), encoding="utf-8")


def _write_shards(target: Path, images: dict, classes: list[str]) -> None:
    for split, read in images.items():
        left = read()
        for number in itertools.count():
            part = list(itertools.islice(left, SHARD))
            if not part:
                break
            with tarfile.open(target / f"{split}-{number:04d}.tar", "w") as shard:
                for image in part:
                    label = f"{Path(image.name).stem}.cls", str(image.label).encode()
                    for name, data in ((image.name, image.data), label):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        shard.addfile(info, io.BytesIO(data))
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def _write_hub(target: Path, images: dict, classes: list[str]) -> None:
    try:
        import datasets  # optional
        from datasets.arrow_writer import ArrowWriter
    except ImportError as error:
        raise InputError(f"--to hub needs a package: pip install datasets ({error})") from None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    splits = datasets.DatasetDict()
    with tempfile.TemporaryDirectory(dir=target.parent) as cache:
        for split, read in images.items():
            path = str(Path(cache, f"{split}.arrow"))
            with ArrowWriter(features=features, path=path) as writer:
                for image in read():
                    writer.write({"image": {"bytes": image.data, "path": image.name}, "label": image.label})
                writer.finalize()
            splits["validation" if split == "val" else split] = datasets.Dataset.from_file(path)
        splits.save_to_disk(str(target))


_WRITERS = {"folders": _write_folders, "zip": _write_zip, "shards": _write_shards, "hub": _write_hub}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = PARSER.parse_args(argv)
    if args.short_side < 0 or args.workers < 1:
        raise InputError("--short-side and --workers must be at least 1")
    counts = convert(args.source, args.target, args.to, args.short_side, args.workers)
    print(f"{args.target}: {counts['train']} training and {counts['val']} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
