"""Errors that a user can fix, atomic writing, text for terminals. Imports nothing of this repository, nor PyTorch."""

import contextlib
import errno
import functools
import os
import sys
from pathlib import Path

# ---- errors --------------------------------------------------------------------------------------

class InputError(ValueError):
    """An argument, a config value, an environment or a file that cannot be used; the message says what to do."""


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that does not exist."""


class RunError(RuntimeError):
    """A run that cannot continue although its command is right: too little memory, a dead process."""


# Disks, permissions and limits, which the user can fix. Any other OSError is a bug: a wrong path is an InputError.
_USERS_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE,
                 errno.EMFILE, errno.ENFILE, errno.EISDIR, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP}


def exit_status(error: BaseException) -> int | None:
    """2 for an error that the user can fix, 1 for a run that cannot continue, None for a bug (with traceback)."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
        return 2
    return 1 if isinstance(error, (RunError, FloatingPointError)) else None


def error_message(error: BaseException) -> str:
    """An error's message; one from a data worker arrives with the worker's traceback and the class before it."""
    text = str(error)
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


@contextlib.contextmanager
def input_errors(source: object = ""):
    """Turns a ValueError about what the user gave into an InputError, with the name of its source before the message.

    The networks and libraries raise ValueError; only the caller knows that the values came from the user.
    """
    try:
        yield
    except ValueError as error:
        raise InputError(f"{source}: {error}" if source else str(error)) from error


def escape_what_the_console_cannot_show() -> None:
    """Prints characters that the encoding of standard output or error does not have as escapes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # closed, or not a text file
            stream.reconfigure(errors="backslashreplace")


def one_line_errors(main):
    """Makes a tool's ``main`` print an error that the user can fix as one line, ``tool.py: message``, and return 2.

    A reader that ends early, such as ``head``, ends the tool without a message.
    """
    tool = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def ending_in_one_line(argv: list[str] | None = None) -> int:
        escape_what_the_console_cannot_show()
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered is written at the exit
            return 128 + 13  # as after SIGPIPE
        except Exception as error:
            status = exit_status(error)
            if status is None:
                raise
            message = "\n".join(map(printable, error_message(error).split("\n")))
            print(f"{tool}: {message}", file=sys.stderr)
            return status

    return ending_in_one_line


# ---- files: a reader finds the complete old file or the complete new one, and links are not followed -------------

@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb", **options):
    """Opens a new file, as ``open`` does, that replaces ``path`` on disk if the block ends without an error."""
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
    """Raises InputError if a path in a run's folder, to be opened for writing, is a link or anything else than a
    regular file, or with ``is_folder`` a folder."""
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
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # CIFS and FUSE cannot do it for folders
            raise
    finally:
        os.close(folder)


# ---- names of classes and files from others, made safe for a terminal and a spreadsheet --------------------------

def printable(text: str) -> str:
    r"""The text on one line; control characters, terminal escapes and invalid UTF-8 are written as ``\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def csv_cell(text: str) -> str:
    """The text as ``printable`` gives it, with an apostrophe before what a spreadsheet would read as a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
