"""What a run writes beside its checkpoints: the log, the metrics, its description and its curves."""

import contextlib
import functools
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import threading
import uuid
from logging.handlers import MemoryHandler
from pathlib import Path

import timm
import torch
import torchvision
import yaml
from termcolor import colored
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import distributed
import plots
from config import to_dict
from inference import image_shape
from resume import TrainState
from utils import InputError, check_place, escape_what_the_console_cannot_show, printable, write_text

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
        paint = functools.partial(colored, no_color=not self.coloured, force_color=self.coloured)
        head = paint(f"[{self.formatTime(record, self.datefmt)}]", "green")
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        level = paint(level, self.COLOURS[record.levelno]) if level else ""
        message = "\n".join(map(printable, record.message.split("\n")))  # names in it may contain terminal escapes
        return f"{head} {level}{message}"


def setup_console(is_first: bool) -> None:
    """Sends the log to standard output: everything from the first process, errors from the others.

    Records logged before ``open_log`` are kept for the file.
    """
    _fill_closed_streams()
    escape_what_the_console_cannot_show()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    handler = _ConsoleHandler(sys.stdout)
    handler.setLevel(logging.INFO if is_first else logging.ERROR)
    handler.setFormatter(_Formatter(coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    logger.handlers = [handler, MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)]
    threading.excepthook = _thread_failed


def _thread_failed(failure) -> None:
    """Logs one line for a thread that could not write, such as TensorBoard's on a full disk; a traceback for a bug."""
    if issubclass(failure.exc_type, OSError):
        logger.error("a thread ended: %s", failure.exc_value)
    else:
        threading.__excepthook__(failure)


def _fill_closed_streams() -> None:
    """Opens the null device for closed standard streams; else a checkpoint would get their number, and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")


def open_log(folder: Path) -> None:
    """Also sends the log to a file of this process, from its beginning, with details that the console does not show.

    Called once the run is sure to start, so that a refused start does not write into the log of a good run.
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


# ---- metrics ---------------------------------------------------------------------------------------

def start_wandb(project: str, name: str, config: dict, folder: Path):
    """Starts the Weights & Biases run of an output folder, or resumes the one whose id is in its ``wandb_id.txt``."""
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

    A record's ``epochs`` are the epochs done, with fractions: an axis that does not depend on the batch size. A run
    that resumes after ``epochs`` and ``step`` drops the records after them.
    """

    def __init__(self, folder: Path, epochs: float, step: int, wandb_run=None):
        path = folder / "metrics.jsonl"
        check_place(folder / "tensorboard", is_folder=True)
        parsed = plots.parse_metrics(path)
        odd = [number for number, (_, record) in enumerate(parsed, start=1) if record is None]
        if odd:
            logger.warning("%s: skipped %d lines that are not records of a run, the first of them line %d", path,
                           len(odd), odd[0])
        write_text(path, "".join(line for line, record in parsed if record and record["epochs"] <= epochs))
        self.file = open(path, "a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb_run = wandb_run
        self.failing = set()

    def write(self, kind: str, step: int, epoch: int, epochs: float, **figures: float) -> None:
        """Records figures of ``kind`` (``train``, ``eval``, ``eval_ema``) after update ``step``, in epoch ``epoch``."""
        record = {"kind": kind, "step": step, "epoch": epoch, "epochs": epochs}
        record |= {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with self._reporting("metrics.jsonl"):
            print(json.dumps(record), file=self.file, flush=True)
        with self._reporting("TensorBoard's events"):
            for name, value in figures.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        with self._reporting("Weights & Biases' log"):
            if self.wandb_run:
                self.wandb_run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """Writes out what is buffered."""
        with self._reporting("metrics.jsonl"):
            self.file.close()
        with self._reporting("TensorBoard's events"):
            self.tensorboard.close()
        with self._reporting("Weights & Biases' log"):
            if self.wandb_run:
                self.wandb_run.finish()

    @contextlib.contextmanager
    def _reporting(self, name: str):
        """Logs once that something cannot be written, for example on a full disk, and lets the run continue."""
        try:
            yield
        except Exception as error:
            if name not in self.failing:
                self.failing.add(name)
                logger.error("cannot write %s: %s; the run continues", name, error)


# ---- the description of a run ----------------------------------------------------------------------

def git_commit() -> str:
    """The commit of this code, with ``-dirty`` after it if files differ from it; ``unknown`` outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_environment(device: torch.device) -> dict:
    """The versions of the packages that a run depends on, and its machine."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
                  f"CPU, {os.cpu_count()} cores" if device.type == "cpu" else device.type,
        "world_size": distributed.world_size(),
    }


def describe_run(config, state: TrainState, device: torch.device, precision: str, metadata: dict) -> dict:
    """The content of ``run.yaml``, with the classes and the changes of settings in the checkpoints' ``metadata``.

    A network that does not take images of the config's size is an InputError.
    """
    layout, parameters = state.layout, list(state.model.parameters())
    try:
        macs = count_macs(state.model, image_shape(config))
    except Exception as error:  # PyTorch's counter fails on some of timm's networks, which train all the same
        _check_img_size(state.model, config)
        logger.warning(f"the multiply-accumulates could not be counted ({error})")
        macs = None
    return describe_environment(device) | {
        "command": " ".join(sys.argv),
        "effective_batch": layout.effective_batch,
        "base_lr": config.TRAIN.BASE_LR,
        "updates_per_epoch": state.lr_scheduler.steps_per_epoch,
        "training_images": layout.training_images,
        "parameters": sum(p.numel() for p in parameters),
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad),
        "macs": macs,
        "amp_dtype": precision,
        "augment_on": layout.augment_on,
        "changes": metadata["changes"],
        "classes": metadata["classes"],
    }


@torch.inference_mode()
def _check_img_size(model: nn.Module, config) -> None:
    """Raises InputError if a timm model does not take images of the config's size."""
    try:
        model.eval()(torch.zeros(1, *image_shape(config), device=next(model.parameters()).device))
    except AssertionError as error:
        size = config.DATA.IMG_SIZE
        raise InputError(f"{config.MODEL.ARCH} does not take a DATA.IMG_SIZE of {size}: {error}") from error


def save_description(config, run: dict, folder: Path) -> None:
    """Saves the config and the description of a run as YAML, and logs it; ``--cfg`` accepts ``config.yaml``."""
    write_text(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    write_text(folder / "run.yaml", yaml.safe_dump(run, sort_keys=False))
    logger.info(f"config: {folder / 'config.yaml'}")
    for key, value in run.items():
        if key not in ("classes", "changes"):
            logger.info(f"{key}: {value}")
    frozen = f", {run['frozen_parameters'] / 1e6:.2f} M of them frozen" if run["frozen_parameters"] else ""
    macs = f"; {run['macs'] / 1e9:.3f} G multiply-accumulates per image" if run["macs"] else ""
    logger.info(f"{run['parameters'] / 1e6:.2f} M parameters{frozen}{macs}")


def draw_curves(folder: Path) -> None:
    """Draws the run's curves into its folder; an error in drawing does not fail the training."""
    try:
        figure = plots.draw_curves({folder.name: plots.read_metrics(folder)})
        path = folder / "curves.png"
        path.unlink(missing_ok=True)  # a link of that name is not followed
        plots.save_figure(figure, path)
    except Exception as error:
        logger.warning(f"the curves were not drawn: {error}")
        logger.debug("where it happened:", exc_info=True)


def whereabouts(folder: Path) -> str:
    """A line for each file that a run has written."""
    places = [
        ("best checkpoint", folder / checkpoint.BEST),
        *(("newest checkpoint", path) for path in checkpoint.list_checkpoints(folder)[:1]),
        ("log", folder / "log_rank0.txt"),
        ("metrics", folder / "metrics.jsonl"),
        ("curves", folder / "curves.png"),
        ("TensorBoard events", folder / "tensorboard"),
        ("Weights & Biases", folder / "wandb"),
    ]
    return "\n".join(f"  {what:<18}  {path}" for what, path in places if path.exists())


@torch.no_grad()
def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of ``shape`` (C, H, W): convolutions, strip layers and linear layers."""
    training, parameter = model.training, next(model.parameters())
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2  # the counter counts a multiply-accumulate as two operations
