"""Atomic writing: a reader finds the complete old file or the complete new one, and links are not followed."""

import contextlib
import os
from pathlib import Path

from models import InputError


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **options):
    """Opens a new file, as ``open`` does, that replaces ``path`` on disk if the block ends without an error.

    Raises:
        OSError: it could not be written; ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, mode.replace("w", "x"), **options) as file:  # x: never through an existing link
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file with a text in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def check_place(path: Path, is_folder: bool = False) -> None:
    """Checks a path in a run's folder that is opened for writing, not replaced, so that no link or pipe is written to.

    Raises:
        InputError: the path exists and is not a regular file, or with ``is_folder`` not a folder.
    """
    fits = path.is_dir() if is_folder else path.is_file()
    if path.is_symlink() or path.exists() and not fits:
        kind = "a link" if path.is_symlink() else "not a folder" if is_folder else "not a regular file"
        raise InputError(f"{path} is {kind}, so the run does not write to it; move it away")


def move(source: Path, target: Path) -> None:
    """Renames a file within its folder, replacing a file that has the new name."""
    os.replace(source, target)
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the renaming itself reaches the disk
    finally:
        os.close(folder)
