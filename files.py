"""Writing a file whole: whoever reads it finds the old one or the new one, and a link in its place is not followed."""

import contextlib
import os
from pathlib import Path

from models import InputError


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **options):
    """Opens a new file, as ``open`` does, which takes the place of ``path`` on disk when the block ends well.

    Raises:
        OSError: it could not be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, mode.replace("w", "x"), **options) as file:  # x: through no link that somebody put there
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Puts a text, in UTF-8, in the place of a file."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def check_place(path: Path, is_folder: bool = False) -> None:
    """Checks a place in a run's folder that is opened for writing, not replaced: no link is followed, no pipe opened.

    Raises:
        InputError: something lies there that is not a regular file, or with ``is_folder`` not a folder.
    """
    fits = path.is_dir() if is_folder else path.is_file()
    if path.is_symlink() or path.exists() and not fits:
        kind = "a link" if path.is_symlink() else "not a folder" if is_folder else "not a regular file"
        raise InputError(f"{path} is {kind}, so the run does not write there; move it away")


def move(source: Path, target: Path) -> None:
    """Gives a file on disk another name in the same folder, in place of what has that name."""
    os.replace(source, target)
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the renaming itself last
    finally:
        os.close(folder)
