"""The log of a run, on the console and in a file."""

import logging
import os
import sys
import threading
from logging.handlers import MemoryHandler
from pathlib import Path

from termcolor import colored
from tqdm import tqdm

import distributed
from files import check_place
from models import InputError
from safe_text import printable

logger = logging.getLogger("strip_mlp")


class _ConsoleHandler(logging.StreamHandler):
    """Prints above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)  # flushes too, so that a job's output file shows the line at once

    def handleError(self, record: logging.LogRecord) -> None:
        """Logs only to the file when the console has been closed."""
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            return super().handleError(record)
        logger.handlers = [handler for handler in logger.handlers if handler is not self]
        sys.stdout = open(os.devnull, "w")


class _FileHandler(logging.FileHandler):
    """Reports once that the file cannot be written, for example on a full disk, and lets the run continue."""

    is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.is_failing:
            self.is_failing = True
            logger.error("cannot write %s: %s; the run continues", self.baseFilename, sys.exc_info()[1])


class _Formatter(logging.Formatter):
    COLOURS = {logging.WARNING: "yellow", logging.ERROR: "red"}

    def __init__(self, coloured: bool):
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self.coloured = coloured

    def formatMessage(self, record: logging.LogRecord) -> str:
        head = f"[{self.formatTime(record, self.datefmt)}]"
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        if self.coloured:
            head = colored(head, "green", force_color=True)
            level = colored(level, self.COLOURS[record.levelno], force_color=True) if level else ""
        message = "\n".join(map(printable, record.message.split("\n")))  # names in it may contain terminal escapes
        return f"{head} {level}{message}"


def setup_console(is_first: bool) -> None:
    """Sends the log to standard output: everything from the first process, errors from the others.

    Records logged before ``open_log`` are kept for the file.
    """
    _fill_closed_streams()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = _ConsoleHandler(sys.stdout)
    handler.setLevel(logging.INFO if is_first else logging.ERROR)
    handler.setFormatter(_Formatter(coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    logger.handlers = [handler, MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)]
    threading.excepthook = _thread_failed


def _fill_closed_streams() -> None:
    """Opens the null device in place of standard streams that the caller has closed.

    Otherwise the next files would get their numbers, and a library's messages on standard error would end up in a
    checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def open_log(folder: Path) -> None:
    """Also sends the log to a file of this process, from its beginning, with details that the console does not show.

    Call it once the run is sure to start, so that a refused start does not write into the log of a good run.

    Raises:
        InputError: the file cannot be opened.
    """
    path = folder / f"log_rank{distributed.rank()}.txt"
    check_place(path)
    try:
        handler = _FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error}); choose another --output") from None
    handler.setFormatter(_Formatter(coloured=False))
    for held in [other for other in logger.handlers if isinstance(other, MemoryHandler)]:
        held.setTarget(handler)
        held.flush()
        logger.removeHandler(held)
    logger.addHandler(handler)


def _thread_failed(failure) -> None:
    """Logs one line for a thread that could not write, such as TensorBoard's on a full disk; a traceback for a bug."""
    if issubclass(failure.exc_type, OSError):
        logger.error("a thread ended: %s", failure.exc_value)
    else:
        threading.__excepthook__(failure)
