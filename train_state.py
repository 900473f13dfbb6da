"""The state that a training saves and restores, and the Checkpointer that decides when and writes it."""

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

import checkpoint
import distributed
import utils
from config import to_dict
from lr_scheduler import LRScheduler
from models import load_strict, model_state_dict
from resume_checks import check_training

logger = logging.getLogger("strip_mlp")

NOT_SAVED = 74  # exit status (EX_IOERR) of a run whose last checkpoint is not in its folder
PREEMPTED = 75  # exit status (EX_TEMPFAIL) of a run that a signal stopped after it saved itself
NO_ACCURACY = -1.0  # below any accuracy, so that the first evaluation is the best so far even at 0 %
SECONDS_WHEN_STOPPED = 20  # seconds to retry on a full disk after a signal; torchrun kills the processes after 30
SECONDS_BETWEEN = 10  # two such tries
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
_SAME_SIGNAL = 1  # seconds
_SAME_SIGNAL_FROM_LAUNCHER = 5  # a launcher passes on signals that its processes may already have received
_NOTHING, _SAVE, _STOP = 0, 1, 2


# ---- what is saved and restored ------------------------------------------------------------------

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
    augment_on: str = "worker"  # or "device"; older checkpoints, without this choice, lack it

    @property
    def images_per_batch(self) -> int:
        """Images of a micro-batch over all processes."""
        return self.batch_size * self.world_size


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
            "skipped_in_row": int(self.skipped_in_row),
            "rng": distributed.gather_objects(utils.get_rng_state()),
            "layout": vars(self.layout),
        }

    def load_state_dict(self, content: dict) -> None:
        """Restores the result of ``state_dict``, bit for bit if the layout is the same.

        With another world size, batch size, accumulation or seed the position in the epoch is recomputed from the
        images seen, and the run continues with other random numbers. Hyperparameters follow this run's config.

        Raises:
            InputError: as ``check_training``; then nothing is changed.
        """
        changed = check_training(content, self)
        load_strict(self.model, model_state_dict(content))
        if self.ema:
            load_strict(self.ema.module, model_state_dict({"model": content["model_ema"]}))
        groups = self.optimizer.state_dict()["param_groups"]
        for group, saved in zip(groups, content["optimizer"]["param_groups"], strict=True):
            group |= {"step": saved["step"]} if "step" in saved else {}  # counted here by some of timm's
        self.optimizer.load_state_dict({"state": self._moments(content["optimizer"]["state"]), "param_groups": groups})
        if content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.batch, self.step = content["epoch"], content["batch"], content["step"]
        self.max_accuracy, self.skipped_in_row = content["max_accuracy"], content["skipped_in_row"]
        if changed.keys() - {"augment_on"}:  # the others determine the order of the images
            self._move_to(self.batch * Layout(**content["layout"]).images_per_batch)
        else:
            utils.set_rng_state(content["rng"][distributed.rank()])
        if changed:
            logger.warning(
                "resumed with %s: the run continues after the same number of images, at epoch %s batch %s, but not bit "
                "for bit like an uninterrupted run", ", ".join(changed.values()), self.epoch, self.batch,
            )
        self.lr_scheduler.step_update(self.step)

    def _moments(self, saved: dict) -> dict:
        """The optimiser's state with the memory layout of the parameters, which its fused form requires."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

        def laid_out(value, parameter):
            is_moment = isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.ndim > 0
            return torch.empty_like(parameter).copy_(value) if is_moment else value

        return {
            index: {key: laid_out(value, parameters[index]) for key, value in entry.items()}
            for index, entry in saved.items()
        }

    def _move_to(self, images_seen: int) -> None:
        """Goes to the last update of this layout at or before an image of the epoch."""
        accumulation = self.layout.accumulation_steps
        batches = self.layout.training_images // self.layout.images_per_batch
        updates = images_seen // self.layout.images_per_batch // accumulation
        self.batch = updates * accumulation
        self.step = self.epoch * -(-batches // accumulation) + updates
        utils.seed_everything(torch.initial_seed() + self.step)


# ---- when ---------------------------------------------------------------------------------------

class Preempted(Exception):
    """The run has saved a checkpoint and stops because of a signal."""


class NotSavedError(Exception):
    """The run is over and its last checkpoint is not in its folder."""


class Checkpointer:
    """Saves a run into its folder. All processes call every method together; rank 0 writes.

    Used as a context manager, the first SIGTERM, SIGUSR1 or SIGINT to reach any process makes all of them finish their
    update, save and stop. Another signal more than a second later (5 seconds under a launcher) has its usual effect; an
    earlier one is taken for the same signal, passed on by a launcher.

    Args:
        config: the run's config, saved along.
        folder: where the checkpoints go.

    ``about`` holds entries that describe the network to readers of a checkpoint; resume does not restore them.
    """

    def __init__(self, config, folder: Path):
        self.config, self.folder = config, folder
        self.about = {"config": to_dict(config), "changes": []}
        self.signal: signal.Signals | None = None
        self.saved_at = time.monotonic()
        self.agreement = None  # started at the previous update

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
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
        is_step = bool(steps) and state.step % steps == 0
        overdue = minutes and time.monotonic() - self.saved_at > 60 * minutes
        wish = _STOP if self.signal else _SAVE if overdue else _NOTHING
        if not distributed.is_distributed():
            return is_step or wish != _NOTHING
        is_due = is_step or self.agreement is not None and self.agreement() != _NOTHING
        self.agreement = None if is_due else distributed.begin_to_agree_on_largest(wish)
        return is_due

    def save(self, state: TrainState, is_best: bool = False, is_last: bool = False) -> bool:
        """Saves the run. If writing fails, the error is logged and the run continues; older checkpoints stay intact.

        For the last checkpoint of a finished or stopped run, it retries for half of HANG_MINUTES and then writes to
        SAVE_ELSEWHERE.

        Returns:
            Whether it was saved.

        Raises:
            Preempted: a signal has reached one of the processes.
            NotSavedError: the last checkpoint is not in the run's folder.
        """
        patience = 30 * self.config.HANG_MINUTES  # seconds: half as long as the other processes wait for this one
        content = state.state_dict() | self.about
        is_saved = distributed.rank() != 0 or self._write(content, self.folder, is_best)
        is_stopping = distributed.agree_on_largest(_STOP if self.signal else _NOTHING) == _STOP
        if not is_saved and (is_last or is_stopping):
            is_saved = self._insist(content, is_best, SECONDS_WHEN_STOPPED if is_stopping else patience)
        is_saved = distributed.broadcast_object(is_saved)
        self.saved_at = time.monotonic()
        if not is_saved and (is_last or is_stopping):
            raise NotSavedError(f"the last checkpoint is not in {self.folder}; the log says why")
        if is_stopping:
            raise Preempted(self.signal.name if self.signal else "signal to another process")
        return is_saved

    def _write(self, content: dict, folder: Path, is_best: bool) -> bool:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = checkpoint.save_checkpoint(content, folder, is_best, self.config.KEEP_CHECKPOINTS)
            logger.info(f"saved {path}{' (best)' if is_best else ''}")
            return True
        except OSError as error:
            logger.error("COULD NOT SAVE A CHECKPOINT: %s. Older ones are intact; free space, or later progress "
                         "may be lost", error)
            return False

    def _insist(self, content: dict, is_best: bool, seconds: float) -> bool:
        """Retries until it succeeds, time is up or a signal comes; then saves elsewhere, which counts as not saved."""
        logger.warning("this is the run's last checkpoint: retrying for %.0f seconds", seconds)
        deadline, signal_before = time.monotonic() + seconds, self.signal
        while time.monotonic() < deadline and self.signal is signal_before:
            time.sleep(SECONDS_BETWEEN)
            if self._write(content, self.folder, is_best):
                return True
        if self.config.SAVE_ELSEWHERE:
            other = Path(self.config.SAVE_ELSEWHERE, self.config.MODEL.NAME, self.config.TAG)
            if self._write(content, other, is_best):
                logger.warning("the last checkpoint is in %s; move it to %s to resume from it", other, self.folder)
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
