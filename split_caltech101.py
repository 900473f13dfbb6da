"""Splits Caltech-101 into train/ and val/, 80 to 20 in each class, the same on every machine.

    python split_caltech101.py 101_ObjectCategories datasets/caltech101 [--link]

The rule: the n image names of a class are sorted, and each in turn draws a number from a new ``random.Random(1024)``;
the floor(4n/5) images with the smallest numbers go to train/, the others to val/. The split of a class therefore
depends only on its own file names. BACKGROUND_Google, which is not a class, hidden files and files that are not images
are skipped.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

from data.listing import class_folders, is_image
from utils import InputError, MissingFileError, one_line_errors

SEED = 1024
LEFT_OUT = "BACKGROUND_Google"


def split_class(names: list[str]) -> dict[str, list[str]]:
    """The file names of one class, in any order, as ``{"train": [...], "val": [...]}``."""
    names = sorted(names)
    draw = random.Random(SEED).random
    shuffled = [name for _, name in sorted((draw(), name) for name in names)]
    num_train = len(names) * 4 // 5
    return {"train": shuffled[:num_train], "val": shuffled[num_train:]}


def plan_split(source: Path) -> dict[str, dict[str, list[str]]]:
    """For each class folder of ``source``, its files by split."""
    if not source.is_dir():
        raise MissingFileError(f"{source} is not a folder; name the one that holds the class folders")
    plan = {}
    for name in [name for name in class_folders(source) if name != LEFT_OUT]:
        images = [entry.name for entry in (source / name).iterdir() if entry.is_file() and is_image(entry.name)]
        if len(images) < 2:
            raise InputError(f"{source / name} holds {len(images)} images, too few for train and val; SRC must be the "
                             "folder that holds the class folders (101_ObjectCategories)")
        plan[name] = split_class(images)
    if not plan:
        raise MissingFileError(f"{source} holds no class folders; name the folder 101_ObjectCategories")
    return plan


def write_split(source: Path, target: Path, link: bool = False) -> dict[str, int]:
    """Creates ``target/train`` and ``target/val``, or neither if it fails; returns the number of images in each.

    ``target`` may hold anything else. With ``link`` the images are symbolic links to absolute paths instead of copies.
    """
    source, target = source.resolve(), target.resolve()
    plan = plan_split(source)
    for split in ("train", "val"):
        if os.path.lexists(target / split):
            raise InputError(f"{target / split} already exists; remove it or choose another folder")
    if target.is_relative_to(source):
        raise InputError(f"{target} is inside {source}, where it would count as a class; choose a folder outside")
    target.mkdir(parents=True, exist_ok=True)
    place, counts = os.symlink if link else shutil.copyfile, {"train": 0, "val": 0}
    with tempfile.TemporaryDirectory(dir=target, prefix=".split-") as unfinished:
        for name, files in plan.items():
            for split in counts:
                folder = Path(unfinished, split, name)
                folder.mkdir(parents=True)
                for file in files[split]:
                    place(source / name / file, folder / file)
                counts[split] += len(files[split])
        for split in counts:
            Path(unfinished, split).rename(target / split)
    return counts


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with the class folders (101_ObjectCategories)")
    parser.add_argument("target", metavar="DST", type=Path, help="folder in which to create train/ and val/")
    parser.add_argument("--link", action="store_true", help="create symbolic links instead of copies (keep SRC)")
    args = parser.parse_args(argv)
    counts = write_split(args.source, args.target, args.link)
    classes = len(list((args.target / "train").iterdir()))
    print(f"{args.target}: {classes} classes, {counts['train']} images in train/, {counts['val']} in val/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
