"""What a run saves and when, and whether it may resume from a checkpoint."""

import logging
import math
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

import checkpoint
import distributed
from checkpoint import short
from config import flat_keys, from_dict, to_dict
from inference import weights_file
from lr_scheduler import LRScheduler
from models import load_strict, own_keys
from resume_checks import check_run, check_training
from utils import InputError, input_errors

logger = logging.getLogger("strip_mlp")

NOT_SAVED = 74  # exit status (EX_IOERR) of a run whose last checkpoint is not in its folder
PREEMPTED = 75  # exit status (EX_TEMPFAIL) of a run that a signal stopped after it saved itself
NO_ACCURACY = -1.0  # below any accuracy, so that the first evaluation is the best so far even at 0 %
SECONDS_WHEN_STOPPED = 20  # seconds to retry on a full disk after a signal; torchrun kills the processes after 30
SECONDS_BETWEEN = 10  # two such tries
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_SAME_SIGNAL = 1  # seconds
_SAME_SIGNAL_FROM_LAUNCHER = 5  # a launcher passes on signals that its processes may already have received
# Keys that change neither the network nor what it learns: where, how fast and in what portions a run computes.
# TrainState explains how a run resumes with another batch size.
FREE_KEYS = {
    "BASE", "MODEL.NAME", "OUTPUT", "TAG", "PRINT_FREQ", "SAVE_FREQ", "SAVE_STEPS", "SAVE_MINUTES",
    "KEEP_CHECKPOINTS", "AMP_DTYPE", "COMPILE", "DETERMINISTIC", "DATA.DATA_PATH", "DATA.BATCH_SIZE",
    "DATA.ZIP_MODE", "DATA.CACHE_MODE", "DATA.NUM_WORKERS", "DATA.MIRROR", "DATA.SKIP_BAD_IMAGES", "HANG_MINUTES",
    "MODEL.RESUME", "TRAIN.ACCUMULATION_STEPS", "TRAIN.AUTO_RESUME", "TRAIN.USE_CHECKPOINT", "TRAIN.MAX_SKIPPED",
    "TEST.PREDICTIONS", "WANDB_PROJECT",
}
# Keys that a run cannot change on resume, because its weights or its classes would not fit.
_FIXED = ("MODEL.TYPE", "MODEL.ARCH", "MODEL.TIMM_KWARGS", "MODEL.NUM_CLASSES", "MODEL.STRIP_MLP.", "DATA.DATASET",
          "DATA.IMG_SIZE", "DATA.HOLD_OUT")


# ---- what is saved and restored --------------------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """Which images an epoch has, in what order, and how it is cut into updates."""

    dataset: str
    training_images: int
    num_classes: int
    seed: int
    is_sharded: bool  # every process draws from its own shard of the images
    batch_size: int  # images per process and micro-batch
    world_size: int
    accumulation_steps: int
    augment_on: str  # "worker" or "device"

    @property
    def images_per_batch(self) -> int:
        """Images of a micro-batch over all processes."""
        return self.batch_size * self.world_size

    @property
    def effective_batch(self) -> int:
        """Images of an update."""
        return self.images_per_batch * self.accumulation_steps


@dataclass
class TrainState:
    """A training between two updates."""

    layout: Layout
    model: nn.Module  # not wrapped in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # only enabled for fp16
    ema: ModelEmaV3 | None
    epoch: int = 0  # the epoch in progress, or next
    batch: int = 0  # micro-batches of that epoch already trained, per process
    step: int = 0  # updates done
    max_accuracy: float = NO_ACCURACY  # best top-1 so far, in percent
    best_loss: float = math.inf  # validation loss of the best: among equal accuracies the lower loss is better
    skipped_in_row: torch.Tensor | int = 0  # updates skipped since the last good one; on the device while training

    def state_dict(self) -> dict:
        """Plain containers and tensors, for ``load_state_dict``. Called by all processes together."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),  # for Swin-Transformer's code; here the step suffices
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "max_accuracy": self.max_accuracy,
            "best_loss": self.best_loss,
            "skipped_in_row": int(self.skipped_in_row),
            "rng": distributed.gather_objects(get_rng_state()),
            "layout": vars(self.layout),
        }

    def load_state_dict(self, content: dict) -> None:
        """Restores the result of ``state_dict``, bit for bit if the layout is the same.

        With another world size, batch size, accumulation or seed the position in the epoch is recomputed from the
        images seen, and the run continues with other random numbers. Hyperparameters follow this run's config. If
        ``check_training`` raises InputError, nothing is changed.
        """
        changed = check_training(content, self)
        load_strict(self.model, own_keys(content["model"]))
        if self.ema:
            load_strict(self.ema.module, own_keys(content["model_ema"]))
        groups = self.optimizer.state_dict()["param_groups"]
        for group, saved in zip(groups, content["optimizer"]["param_groups"], strict=True):
            group |= {"step": saved["step"]} if "step" in saved else {}  # counted here by some of timm's
        self.optimizer.load_state_dict({"state": self._moments(content["optimizer"]["state"]), "param_groups": groups})
        if content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.batch, self.step = content["epoch"], content["batch"], content["step"]
        self.max_accuracy, self.skipped_in_row = content["max_accuracy"], content["skipped_in_row"]
        self.best_loss = content.get("best_loss", math.inf)
        if changed.keys() - {"augment_on"}:  # the others determine the order of the images
            self._move_to(self.batch * Layout(**content["layout"]).images_per_batch)
        else:
            set_rng_state(content["rng"][distributed.rank()])
        if changed:
            logger.warning(
                "resumed with %s: the run continues after the same number of images, at epoch %s batch %s, but not bit "
                "for bit like an uninterrupted run", ", ".join(changed.values()), self.epoch, self.batch,
            )
        self.lr_scheduler.step_update(self.step)

    def networks(self) -> dict[str, nn.Module]:
        """The networks to evaluate, by the name of their records in the metrics."""
        return {"eval": self.model} | ({"eval_ema": self.ema.module} if self.ema else {})

    def finish_epoch(self, results: dict[str, dict]) -> tuple[bool, bool]:
        """Moves to the next epoch, after an evaluation of the network and, if there is one, of its average.

        Returns:
            Whether this is the best epoch so far, by the better of the two: by top-1, and if equal by the loss; and
            whether the average is that better one.
        """
        self.epoch, self.batch = self.epoch + 1, 0
        name, result = max(results.items(), key=lambda item: (item[1]["acc1"], -item[1]["loss"]))
        found, before = (result["acc1"], -result["loss"]), (self.max_accuracy, -self.best_loss)
        is_best = found > before and math.isfinite(result["loss"])
        if is_best:
            self.max_accuracy, self.best_loss = result["acc1"], result["loss"]
        return is_best, name == "eval_ema"

    def _moments(self, saved: dict) -> dict:
        """The optimiser's state with the memory layout of the parameters, which PyTorch's fused optimisers require."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def laid_out(value, parameter):
            is_moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 0
            return torch.empty_like(parameter).copy_(value) if is_moment else value

        return {
            index: {key: laid_out(value, parameters[index]) for key, value in entry.items()}
            for index, entry in saved.items()
        }

    def _move_to(self, images_seen: int) -> None:
        """Moves to the last update, counted in this layout, before the epoch's image number ``images_seen``."""
        accumulation = self.layout.accumulation_steps
        batches = self.layout.training_images // self.layout.images_per_batch
        updates = images_seen // self.layout.images_per_batch // accumulation
        self.batch = updates * accumulation
        self.step = self.epoch * -(-batches // accumulation) + updates
        seed_everything(torch.initial_seed() + self.step)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict:
    """This process's random states, in plain containers and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict) -> None:
    """Restores the result of ``get_rng_state``."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


# ---- when ------------------------------------------------------------------------------------------

class Preempted(Exception):
    """The run has saved a checkpoint and stops because of a signal."""


class NotSavedError(Exception):
    """The run is over and its last checkpoint is not in its folder."""


class Checkpointer:
    """Saves a run into its folder. All processes call every method together; rank 0 writes.

    Used as a context manager, the first SIGTERM, SIGUSR1, SIGINT or SIGHUP to reach any process makes all of them
    finish their update, save and stop. Another signal more than a second later (5 seconds under a launcher) has its
    usual effect; an earlier one is taken for the same signal, passed on by a launcher.

    ``metadata`` holds entries that describe the run to readers of a checkpoint; they are not restored.
    """

    def __init__(self, config, folder: Path):
        self.config, self.folder = config, folder
        self.metadata = {"config": to_dict(config), "changes": []}
        self.signal: signal.Signals | None = None
        self.saved_at = time.monotonic()
        self.agreement = None  # started at the previous update

    def __enter__(self):
        # What is ignored stays ignored: SIGHUP under nohup, SIGINT in a shell's background job.
        signals = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *exception):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def is_due(self, state: TrainState) -> bool:
        """Whether to save after this update, the same answer on all processes.

        One process may see a signal or the time before the others. Several processes agree during the next update, and
        so save one update later.
        """
        steps, minutes = self.config.SAVE_STEPS, self.config.SAVE_MINUTES
        is_step = steps > 0 and state.step % steps == 0
        is_time = self.signal is not None or minutes > 0 and time.monotonic() - self.saved_at > 60 * minutes
        if not distributed.is_distributed():
            return is_step or is_time
        is_due = is_step or self.agreement is not None and self.agreement()
        self.agreement = None if is_due else distributed.begin_any(is_time)
        return is_due

    def save(self, state: TrainState, is_best: bool = False, is_last: bool = False) -> bool:
        """Saves the run and returns whether that worked. If not, the error is logged and the run continues; older
        checkpoints stay intact. For the last checkpoint of a finished or stopped run, it tries again for a while.

        Raises:
            Preempted: a signal has reached one of the processes.
            NotSavedError: the last checkpoint is not in the run's folder.
        """
        patience = 30 * self.config.HANG_MINUTES  # seconds: half as long as the other processes wait for this one
        content = state.state_dict() | self.metadata
        is_saved = distributed.rank() != 0 or self._write(content, is_best)
        is_stopping = any(distributed.gather_objects(self.signal is not None))
        if not is_saved and (is_last or is_stopping):
            is_saved = self._retry(content, is_best, SECONDS_WHEN_STOPPED if is_stopping else patience)
        is_saved = distributed.broadcast_object(is_saved)
        self.saved_at = time.monotonic()
        if not is_saved and (is_last or is_stopping):
            raise NotSavedError(f"the last checkpoint is not in {self.folder}; the log says why")
        if is_stopping:
            raise Preempted(self.signal.name if self.signal else "signal to another process")
        return is_saved

    def _write(self, content: dict, is_best: bool) -> bool:
        try:
            if not self.folder.is_dir():
                logger.error("%s WAS DELETED while the run wrote into it, with its log and metrics; creating it again "
                             "for the checkpoints", self.folder)
                self.folder.mkdir(parents=True)
            path = checkpoint.save_checkpoint(content, self.folder, is_best, self.config.KEEP_CHECKPOINTS)
            logger.info(f"saved {path}{' (best)' if is_best else ''}")
            return True
        except OSError as error:
            logger.error("COULD NOT SAVE A CHECKPOINT: %s. Older ones are intact; free space, or later progress "
                         "may be lost", error)
            return False

    def _retry(self, content: dict, is_best: bool, seconds: float) -> bool:
        """Tries again until it succeeds, time is up or another signal comes."""
        logger.warning("this is the run's last checkpoint: retrying for %.0f seconds", seconds)
        deadline, signal_before = time.monotonic() + seconds, self.signal
        while time.monotonic() < deadline and self.signal is signal_before:
            time.sleep(SECONDS_BETWEEN)
            if self._write(content, is_best):
                return True
        return False

    def _receive(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self.received_at = signal.Signals(number), time.monotonic()
            if distributed.rank() == 0:  # the log may be in the middle of a line
                last = "the next" if distributed.is_distributed() else "this"  # see is_due
                again = "; Ctrl-C again stops now, without saving" if number == signal.SIGINT else ""
                os.write(2, f"{self.signal.name}: stopping after {last} update{again}\n".encode())
        elif time.monotonic() - self.received_at > (
            _SAME_SIGNAL_FROM_LAUNCHER if distributed.is_distributed() else _SAME_SIGNAL
        ):
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)


# ---- which checkpoint, and whether it is of this run -----------------------------------------------

def find_resume(config, folder: Path, allow_changes: bool) -> tuple[Path | None, dict | None, list[dict]]:
    """The newest good checkpoint in ``folder``, else the one that the config names, else None.

    Also returns its content, if this process has read it already, and the changes of settings so far.
    """
    path, content, changes = None, None, []
    if distributed.rank() == 0:
        if config.TRAIN.AUTO_RESUME:
            path, content = checkpoint.newest_checkpoint(folder) or (None, None)
        elif not config.MODEL.RESUME and checkpoint.list_checkpoints(folder):
            raise InputError(f"TRAIN.AUTO_RESUME is False, but {folder} already holds the checkpoints of a run; give "
                             "the new run another --tag, or delete the folder")
        if path and config.MODEL.RESUME:
            logger.info(f"resuming from this run's own checkpoints; --resume {config.MODEL.RESUME} is ignored")
        elif config.MODEL.RESUME:
            path = weights_file(config.MODEL.RESUME)
            content = checkpoint.load_file(path)
        if content:
            with input_errors(path):
                check_run(content)
        if content and content.keys() >= {"config", "layout"}:  # a training; anything else cannot be resumed
            changes = accept_changes(content, path, config, allow_changes)
    return distributed.broadcast_object(path), content, changes


def check_data(content: dict, path: Path, classes: list[str], fingerprint: str) -> None:
    """Raises InputError if the classes or images of a run are not those that its checkpoint was trained on."""
    saved = content.get("classes")
    if isinstance(saved, list) and saved != classes:
        label = next((i for i, pair in enumerate(zip(saved, classes, strict=False)) if pair[0] != pair[1]),
                     min(len(saved), len(classes)))
        before, now = (short(names[label]) if label < len(names) else "missing" for names in (saved, classes))
        raise InputError(f"{path} was trained on other classes: label {label} was {before} and is {now} now. Restore "
                         "the class folders, or give the new run another --tag and start it with --pretrained")
    if content.get("fingerprint", fingerprint) != fingerprint:
        raise InputError(f"{path} was trained on other images: their names or labels differ. Restore the data set, or "
                         "give the new run another --tag and start it with --pretrained")


def is_finished(content: dict | None, config, training_images: int) -> bool:
    """Whether a checkpoint is the last of this run; one trained on another number of images is not."""
    if not content or not content.keys() >= {"epoch", "layout"}:
        return False
    images = content["layout"].get("training_images")
    return content["epoch"] == config.TRAIN.EPOCHS and type(images) is int and images == training_images


def resume(path: Path, content: dict | None, state: TrainState, checkpointer: Checkpointer) -> None:
    """Restores a checkpoint and sets aside those in the run's folder that would seem newer."""
    content, folder, layout = content or checkpoint.load_file(path), checkpointer.folder, state.layout
    with input_errors(path):
        state.load_state_dict(content)
    if "is_average_best" in content:
        checkpointer.metadata["is_average_best"] = content["is_average_best"] is True
    before, now = Layout(**content["layout"]).effective_batch, layout.effective_batch
    if before != now:
        logger.warning(f"the effective batch (images per update) changes from {before} to {now}: the learning rate "
                       "does not follow, and the run cannot be compared with others any more; run.yaml records it")
        change = {"step": content["step"], "keys": {"effective batch": f"{before} -> {now}"}}
        checkpointer.metadata["changes"] = checkpointer.metadata["changes"] + [change]
    # If updates are counted differently now, first save the run under its new step.
    if state.step != content["step"] and not checkpointer.save(state):
        raise InputError(f"{path} was resumed with another batch size, but the checkpoint with the new number of "
                         f"updates could not be written to {folder}; free space and rerun the same command")
    if distributed.rank() == 0:
        checkpoint.set_aside_after(state.step, folder)


def changed_keys(saved: dict, config) -> dict[str, str]:
    """``{"TRAIN.EPOCHS": "2 -> 4"}``: the keys that affect what is learnt and differ from a saved config."""
    before, now = flat_keys(from_dict(saved, "its config")), flat_keys(config)
    changed = [key for key in now if key not in FREE_KEYS and before[key] != now[key]]
    return {key: f"{before[key]!r:.200} -> {now[key]!r:.200}" for key in changed}


def accept_changes(content: dict, path: Path, config, allow_changes: bool) -> list[dict]:
    """All changes of a run's settings, ``[{"step": 7, "keys": {"TRAIN.EPOCHS": "2 -> 4"}}]``, those of this start last.

    A setting that differs from the checkpoint's is an InputError without ``allow_changes``, and always if the weights
    depend on it.
    """
    keys, changes = changed_keys(content["config"], config), content.get("changes", [])
    named = ", ".join(f"{key} {change}" for key, change in keys.items())
    if any(key.startswith(_FIXED) for key in keys):
        raise InputError(f"{path} is from a run with another network or data set: {named}. Give the new run another "
                         "--tag; to start it from these weights, use --pretrained")
    if keys and not allow_changes:
        raise InputError(f"{path} is from a run with other settings: {named}. Give the new run another --tag, or add "
                         "--allow-changes to resume this run with the new settings; run.yaml records the change")
    return changes + [{"step": content["step"], "keys": keys}] if keys else changes
