"""Packs an ImageFolder data set into the zip form that ``main.py --zip`` reads: few files, the same images and labels.

    python tools/zip_imagefolder.py DIR ZIPPED
    python main.py --zip --data-path ZIPPED --cfg configs/X.yaml

DIR holds train/<class>/*.jpg and val/<class>/*.jpg (or another format). ZIPPED gets train.zip, train_map.txt, val.zip
and val_map.txt, whole or not at all. The images are stored as they are, and the same images make the same bytes
whenever and wherever they are packed.
"""

import argparse
import os
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.datasets import check_zip_classes, folder_dataset
from data.zipped import ZipDataset

SPLITS = ("train", "val")


def zip_imagefolder(source: Path, target: Path) -> dict[str, int]:
    """Writes ``<split>.zip`` and ``<split>_map.txt`` of both splits into ``target``; returns the images in each.

    Args:
        source: the folder of ``train/`` and ``val/``.
        target: created if need be.

    Raises:
        FileExistsError: ``target`` has one of the files already.
        FileNotFoundError, ValueError: ``source`` is no ImageFolder of two splits with the same classes, or has a file
            whose name no map file can hold.
    """
    names = [name for split in SPLITS for name in (f"{split}.zip", f"{split}_map.txt")]
    for name in names:
        if os.path.lexists(target / name):
            raise FileExistsError(f"{target / name} exists already; remove it or choose another folder")
    folders = {split: folder_dataset(source, split) for split in SPLITS}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".zip-") as unfinished:
        for split, folder in folders.items():
            write_split(folder, Path(unfinished), split)
            check_split(folder, Path(unfinished), split)
        check_zip_classes(Path(unfinished), len(folders["train"].classes))
        for name in names:
            Path(unfinished, name).rename(target / name)
    return {split: len(folder) for split, folder in folders.items()}


def write_split(folder, target: Path, split: str) -> None:
    """Writes the archive and the map file of one split, given as a torchvision ``ImageFolder``."""
    lines = []
    with zipfile.ZipFile(target / f"{split}.zip", "w", zipfile.ZIP_STORED) as archive:
        for path, label in folder.samples:
            member = _member(Path(path).relative_to(folder.root))
            lines.append(f"{member}\t{label}\n")
            info = zipfile.ZipInfo(member)  # of 1980, the earliest date that zip files know
            info.external_attr = 0o644 << 16
            archive.writestr(info, Path(path).read_bytes())
    (target / f"{split}_map.txt").write_text("".join(lines), encoding="utf-8")


def check_split(folder, target: Path, split: str) -> None:
    """Reads one split back and raises ValueError where it is not the folder's: checksums, order, labels, classes."""
    with zipfile.ZipFile(target / f"{split}.zip") as archive:
        damaged = archive.testzip()
    dataset = ZipDataset(target, split, len(folder.classes))
    if damaged or dataset.labels != folder.targets or dataset.classes != folder.classes:
        raise ValueError(f"{split}.zip does not read back as it was written ({damaged or 'labels'}); nothing was kept")


def _member(path: Path) -> str:
    """The name in the archive of ``<class>/<folders>/<file>``: ``<folders>/<class>/<file>``.

    So every image lies directly in a folder with the name of its class, by which ``ZipDataset`` names the classes.
    """
    name, *folders, file = path.parts
    member = "/".join((*folders, name, file))
    if len(member.splitlines()) != 1 or member.encode(errors="replace").decode() != member:
        raise ValueError(f"{str(path)!r}: a map file holds no names with line breaks or outside UTF-8; rename it")
    return member


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="DIR", type=Path, help="the data set: a folder with train/ and val/")
    parser.add_argument("target", metavar="ZIPPED", type=Path, help="folder for the four files; made if need be")
    args = parser.parse_args(argv)
    try:
        counts = zip_imagefolder(args.source, args.target)
    except (ValueError, OSError) as error:
        print(f"zip_imagefolder.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {counts['train']} images in train.zip, {counts['val']} in val.zip")
    return 0


if __name__ == "__main__":
    sys.exit(main())
