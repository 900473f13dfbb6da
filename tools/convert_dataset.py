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

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, one_line_errors, printable

FORMS = ("folders", "zip", "shards", "hub")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="DIR", type=Path, help="the data set, in any form")
    parser.add_argument("target", metavar="TARGET", type=Path, help="an empty or new folder")
    parser.add_argument("--to", choices=FORMS, required=True, help="the form to write")
    parser.add_argument("--short-side", type=int, default=0, metavar="N", help="shrink larger images to N pixels")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), metavar="N",
                        help="processes that read and shrink; default: one per core, at most 16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # before the slow imports, so that --help is fast

import functools
import io
import multiprocessing
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
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
    """Writes the data set in ``source`` into ``target``; returns the images in each split.

    Args:
        source: the data set, in any form.
        target: created if necessary.
        form: ``"folders"``, ``"zip"``, ``"shards"`` or ``"hub"``.
        short_side: shorter side to shrink larger images to, in pixels; 0: copy all images.
        workers: processes that read and shrink.

    Raises:
        InputError: ``target`` exists and is not empty.
        MissingFileError, InputError: ``source`` holds no data set of two splits with the same classes, an image cannot
            be read, a class name is not a valid folder name, or the result reads back as another data set.
    """
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; choose another folder")
    sets = {split: _open(source, split) for split in SPLITS}
    classes = sets["train"].classes
    check_same_classes(classes, sets["val"].classes, source)
    for label, name in enumerate(classes):
        if not name or "/" in name or is_system(name) or not name.isprintable() or len(os.fsencode(name)) > 255:
            raise InputError(f"{source}: the class name {name!r:.300} cannot be used as a folder name")
        if name in classes[:label]:
            raise InputError(f"{source}: two classes are called {name}; each needs a folder of its own")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as unfinished:
        place = Path(unfinished, "data")
        place.mkdir()
        images = {split: functools.partial(_images, sets[split], split, short_side, workers) for split in SPLITS}
        _WRITERS[form](place, images, classes)
        for split in SPLITS:
            written = _open(place, split)
            if written.classes != classes or sorted(written.labels) != sorted(sets[split].labels):
                raise InputError(f"{source}: {len(sets[split])} images of {split} were written as {form}, and "
                                 f"{len(written)} read back; nothing was kept. Please report this")  # fmt: skip
        for entry in place.iterdir():
            if not is_system(entry.name):  # the index that reading back left
                entry.rename(target / entry.name)
    return {split: len(dataset) for split, dataset in sets.items()}


def _open(source: Path, split: str):
    if (source / f"{split}.zip").is_file():
        return ZipDataset(source, split, _ANY)
    return open_images(source, split)


# ---- reading -------------------------------------------------------------------------------------


def _images(dataset, split: str, short_side: int, workers: int) -> Iterator[Stored]:
    """The images of a split, in order."""
    read = functools.partial(_read, dataset, short_side)
    with tqdm(total=len(dataset), desc=split, unit=" images", disable=None) as bar:
        if workers == 1:
            for image in map(read, range(len(dataset))):
                yield image
                bar.update()
            return
        with multiprocessing.Pool(workers) as pool:
            for image in pool.imap(read, range(len(dataset)), chunksize=16):
                yield image
                bar.update()


def _read(dataset, short_side: int, index: int) -> Stored:
    data, is_shrunk = dataset.read(index), False
    if short_side:
        image, label = dataset[index]
        shorter = min(image.size)
        is_shrunk = shorter > short_side
        if is_shrunk:
            size = tuple(max(1, round(side * short_side / shorter)) for side in image.size)
            file = io.BytesIO()
            image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
            data = file.getvalue()
    decode(data, dataset.name(index))  # raises InputError, with the image's name, for one that is damaged
    name = Path(dataset.name(index).rpartition(":")[2])
    extension = ".jpg" if is_shrunk else name.suffix.lower()
    if extension not in IMAGE_EXTENSIONS:  # Hugging Face's have no names
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            extension = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format, f".{image.format.lower()}")
    stem = printable(name.stem.partition(".")[0]).replace("\\", "_")[:60]  # safe in a text and in a file system
    return Stored(f"{index:08d}_{stem}{extension}" if not stem.isdecimal() else f"{index:08d}{extension}",
                  dataset.labels[index], data)  # fmt: skip


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
        for number, part in enumerate(_parts(read(), SHARD)):
            with tarfile.open(target / f"{split}-{number:04d}.tar", "w") as shard:
                for image in part:
                    for name, data in ((image.name, image.data),
                                       (f"{Path(image.name).stem}.cls", str(image.label).encode())):  # fmt: skip
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        shard.addfile(info, io.BytesIO(data))
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def _parts(images: Iterable[Stored], size: int) -> Iterator[list[Stored]]:
    part = []
    for image in images:
        part.append(image)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _write_hub(target: Path, images: dict, classes: list[str]) -> None:
    try:
        import datasets  # optional
        from datasets.arrow_writer import ArrowWriter
    except ImportError as error:
        raise InputError(f"--to hub needs a package: pip install datasets ({error})") from None
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    names, splits = {"train": "train", "val": "validation"}, {}
    with tempfile.TemporaryDirectory(dir=target.parent) as cache:
        for split, read in images.items():
            path = str(Path(cache, f"{split}.arrow"))
            with ArrowWriter(features=features, path=path) as writer:
                for image in read():
                    writer.write({"image": {"bytes": image.data, "path": image.name}, "label": image.label})
                writer.finalize()
            splits[names[split]] = datasets.Dataset.from_file(path)
        datasets.DatasetDict(splits).save_to_disk(str(target))


_WRITERS = dict(zip(FORMS, (_write_folders, _write_zip, _write_shards, _write_hub), strict=True))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = parse_arguments(argv)
    if args.short_side < 0 or args.workers < 1:
        raise InputError("--short-side and --workers must be at least 1")
    counts = convert(args.source, args.target, args.to, args.short_side, args.workers)
    print(f"{args.target}: {counts['train']} training and {counts['val']} validation images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
