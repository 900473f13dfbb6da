"""What a run writes for people and programs: console, log file, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import uuid
from pathlib import Path

from termcolor import colored
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger("strip_mlp")


class _ConsoleHandler(logging.StreamHandler):
    """Prints above a progress bar, where there is one, instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except (OSError, ValueError):  # nobody reads the terminal any more; the log file goes on
            logger.removeHandler(self)
            sys.stdout = open(os.devnull, "w")


class _FileHandler(logging.FileHandler):
    """Says once that the file cannot be written, on a full disk, and lets the run go on."""

    is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.is_failing:
            self.is_failing = True
            logger.error("cannot write %s: %s; the run goes on", self.baseFilename, sys.exc_info()[1])


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
        return f"{head} {level}{record.message}"


def setup_console(is_first: bool) -> None:
    """Sends the log to standard output: everything from the first process, errors from the others."""
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    stream = sys.stdout or open(os.devnull, "w")  # without a standard output at all there is only the log file
    handler = _ConsoleHandler(stream)
    handler.setLevel(logging.INFO if is_first else logging.ERROR)
    handler.setFormatter(_Formatter(coloured=stream.isatty() and "NO_COLOR" not in os.environ))
    logger.handlers = [handler]
    threading.excepthook = _thread_failed


def add_log_file(path: Path) -> None:
    """Sends the log to a file as well, with the details that the terminal is spared."""
    handler = _FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Formatter(coloured=False))
    logger.addHandler(handler)


def _thread_failed(failure) -> None:
    """One line for a thread that could not write, as TensorBoard's cannot on a full disk; a traceback for a bug."""
    if issubclass(failure.exc_type, OSError):
        logger.error("a thread ended: %s", failure.exc_value)
    else:
        threading.__excepthook__(failure)


def start_wandb(project: str, name: str, config: dict, folder: Path):
    """Starts the Weights & Biases run of an output folder, or goes on with it.

    Its id is kept in ``wandb_id.txt``. Logging in, ``WANDB_MODE=offline`` and all else is as Weights & Biases documents
    it; an offline run is sent with ``wandb sync``.

    Raises:
        ValueError: wandb is not installed, or cannot start.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"WANDB_PROJECT is {project!r} but wandb is not there ({error}); pip install wandb, or leave "
                         "WANDB_PROJECT empty") from error
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex + "\n")
    try:
        return wandb.init(project=project, name=name, config=config, dir=str(folder), id=id_file.read_text().strip(),
                          resume="allow", settings=wandb.Settings(console="off"))
    except wandb.errors.Error as error:
        raise ValueError(f"Weights & Biases cannot start: {str(error).rstrip('.')}; or set WANDB_MODE=offline in the "
                         "environment, or leave WANDB_PROJECT empty") from error


class MetricsWriter:
    """``metrics.jsonl``, one record a line, and the same figures as TensorBoard events and in Weights & Biases.

    Args:
        folder: the run's output folder.
        epoch, step: the epoch in progress and the updates done where the run goes on; records of what comes after,
            which a run that broke off had written, are dropped.
        wandb_run: what ``start_wandb`` returned, or None. Weights & Biases itself drops what it already has.
    """

    def __init__(self, folder: Path, epoch: int, step: int, wandb_run=None):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_before(line, epoch, step)]
        temporary = path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb_run = wandb_run
        self.failing = set()

    def write(self, kind: str, step: int, epoch: int, **figures: float) -> None:
        """Records the figures of ``kind`` (``train``, ``eval``, ``eval_ema``) after update ``step`` of ``epoch``."""
        record = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with self._going_on("metrics.jsonl"):
            self.file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **record}) + "\n")
            self.file.flush()
        with self._going_on("TensorBoard's events"):
            for name, value in figures.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb_run:
            with self._going_on("Weights & Biases' log", Exception):
                self.wandb_run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Writes out what is buffered."""
        with self._going_on("metrics.jsonl"):
            self.file.close()
        with self._going_on("TensorBoard's events"):
            self.tensorboard.close()
        if self.wandb_run:
            with self._going_on("Weights & Biases' log", Exception):
                self.wandb_run.finish()

    @contextlib.contextmanager
    def _going_on(self, name: str, failures: type[Exception] = OSError):
        """Says once that something cannot be written, on a full disk, and lets the run go on."""
        try:
            yield
        except failures as error:
            if name not in self.failing:
                self.failing.add(name)
                logger.error("cannot write %s: %s; the run goes on", name, error)


def _is_before(line: str, epoch: int, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # a line that a killed run left unfinished
        return False
    is_trained = record["kind"] == "train" and record["step"] <= step
    return record["epoch"] < epoch or record["epoch"] == epoch and is_trained
