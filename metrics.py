"""The figures of a run: ``metrics.jsonl``, TensorBoard, Weights & Biases."""

import contextlib
import json
import logging
import math
import re
import uuid
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from files import check_place, write_text
from models import InputError

logger = logging.getLogger("strip_mlp")


def start_wandb(project: str, name: str, config: dict, folder: Path):
    """Starts the Weights & Biases run of an output folder, or resumes it.

    Its id is kept in ``wandb_id.txt``. Logging in and ``WANDB_MODE=offline`` work as Weights & Biases documents them;
    an offline run is uploaded with ``wandb sync``.

    Raises:
        InputError: wandb is not installed or cannot start, or the run's id or folder is invalid.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError(f"WANDB_PROJECT is {project!r} but wandb is not installed ({error}); pip install wandb, or "
                         "leave WANDB_PROJECT empty") from error
    id_file = folder / "wandb_id.txt"
    check_place(id_file)
    check_place(folder / "wandb", is_folder=True)
    if not id_file.exists():
        write_text(id_file, uuid.uuid4().hex + "\n")
    id = id_file.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", id, re.ASCII):
        raise InputError(f"{id_file} holds {id!r:.80}, not the id of a run; delete the file to start a new one")
    try:
        return wandb.init(project=project, name=name, config=config, dir=str(folder), id=id, resume="allow",
                          settings=wandb.Settings(console="off"))
    except wandb.errors.Error as error:
        raise InputError(f"Weights & Biases cannot start: {str(error).rstrip('.')}; or set WANDB_MODE=offline in the "
                         "environment, or leave WANDB_PROJECT empty") from error


class MetricsWriter:
    """``metrics.jsonl``, one record per line, and the same figures in TensorBoard and Weights & Biases.

    A record's ``epochs`` are the epochs done, with fractions: an axis that does not depend on the batch size, while
    steps count updates of the batch size at that time.

    Args:
        folder: the run's output folder.
        epochs: the epochs done where the run resumes, with fractions. Later records, written by an interrupted run, are
            dropped.
        step: the updates done there.
        wandb_run: what ``start_wandb`` returned, or None. Weights & Biases itself drops what it already has.
    """

    def __init__(self, folder: Path, epochs: float, step: int, wandb_run=None):
        path = folder / "metrics.jsonl"
        check_place(folder / "tensorboard", is_folder=True)
        write_text(path, "".join(line for line, done in _read_records(path) if done <= epochs))
        self.file = open(path, "a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb_run = wandb_run
        self.failing = set()

    def write(self, kind: str, step: int, epoch: int, epochs: float, **figures: float) -> None:
        """Records figures of ``kind`` (``train``, ``eval``, ``eval_ema``) after update ``step``, in epoch ``epoch``."""
        record = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with self._going_on("metrics.jsonl"):
            self.file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, "epochs": epochs, **record}) + "\n")
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
        """Reports once that something cannot be written, for example on a full disk, and lets the run continue."""
        try:
            yield
        except failures as error:
            if name not in self.failing:
                self.failing.add(name)
                logger.error("cannot write %s: %s; the run continues", name, error)


def _read_records(path: Path) -> list[tuple[str, float]]:
    """The lines of a run's metrics and the epochs done at each; other lines are skipped with a warning."""
    records, odd = [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            figures = record["step"], record["epoch"], record["epochs"]
            if not isinstance(record["kind"], str) or not all(type(figure) in (int, float) for figure in figures):
                raise TypeError
            records.append((line.decode(), record["epochs"]))
        except (ValueError, KeyError, TypeError, RecursionError):  # cut short by a kill, or not written by a run
            odd.append(number)
    if odd:
        logger.warning("%s: skipped %d lines that are not records of a run, the first of them line %d", path, len(odd),
                       odd[0])
    return records
