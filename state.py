"""What determines the rest of a training: the one list that a checkpoint saves and a resume restores."""

import logging
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import nn

import distributed
import utils
from lr_scheduler import LRScheduler
from models import load_strict, model_state_dict

logger = logging.getLogger("strip_mlp")


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

    @property
    def images_per_batch(self) -> int:
        """Images of a micro-batch over all processes."""
        return self.batch_size * self.world_size


@dataclass
class TrainState:
    """A training between two updates."""

    layout: Layout
    model: nn.Module  # bare: not wrapped for distribution
    optimizer: torch.optim.Optimizer
    lr_scheduler: LRScheduler
    scaler: torch.amp.GradScaler  # disabled but for fp16
    ema: ModelEmaV3 | None
    epoch: int = 0  # the epoch in progress, or next
    batch: int = 0  # micro-batches of that epoch already trained, per process
    step: int = 0  # updates done
    max_accuracy: float = 0.0  # best top-1 so far, in percent
    skipped_in_row: torch.Tensor | int = 0  # updates skipped since the last good one; on the device while training

    def state_dict(self) -> dict:
        """Plain containers and tensors, for ``load_state_dict``. Called by all processes together."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "max_accuracy": self.max_accuracy,
            "skipped_in_row": int(self.skipped_in_row),
            "rng": distributed.gather_objects(utils.get_rng_state()),
            "layout": vars(self.layout),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restores what ``state_dict`` returned, to the bit where the layout is the same.

        With another world size, batch size, accumulation or seed the position in the epoch is recomputed from the
        images seen, and the run goes on with other random numbers. Hyperparameters follow this run's config.

        Raises:
            ValueError: the checkpoint holds no whole training, as a released one does not, or one that cannot go on
                here: another data set, network or optimiser.
        """
        missing = self.state_dict().keys() - checkpoint.keys()
        if missing:
            raise ValueError(
                f"the checkpoint cannot be resumed, it lacks {', '.join(sorted(missing))}; to start a new training "
                "from its weights use --pretrained, to evaluate it --eval"
            )
        saved, own = checkpoint["layout"], vars(self.layout)
        if saved.keys() != own.keys():
            raise ValueError("the checkpoint was written by another version of this code; use --pretrained")
        changed = {key: f"{key} {saved[key]} -> {own[key]}" for key in own if saved[key] != own[key]}
        if changed.keys() & {"dataset", "training_images", "num_classes"}:
            raise ValueError(
                f"the checkpoint was trained on another data set ({', '.join(changed.values())}); to train its weights "
                "on this one use --pretrained and another --tag"
            )
        if changed and checkpoint["batch"] and (saved["is_sharded"] or own["is_sharded"]):
            raise ValueError(
                f"the checkpoint is from the middle of an epoch over shards of the images, which changed "
                f"({', '.join(changed.values())}), so that what is left of the epoch is not defined; resume as before, "
                "or from a checkpoint at the end of an epoch"
            )
        groups = self.optimizer.state_dict()["param_groups"]
        saved_groups = checkpoint["optimizer"]["param_groups"]
        if groups[0].keys() != saved_groups[0].keys():
            raise ValueError(
                "the checkpoint was written with another optimiser, or by another version of this code; set "
                "TRAIN.OPTIMIZER.NAME to it, or start from its weights with --pretrained"
            )
        if self.ema and checkpoint["model_ema"] is None:
            raise ValueError("TRAIN.EMA.ENABLED is True but the checkpoint holds no average; resume with it False")

        load_strict(self.model, model_state_dict(checkpoint))
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            raise ValueError(
                "the checkpoint was written with other parameter groups; set TRAIN.FREEZE_STAGES as it was, and "
                "TRAIN.LAYER_DECAY to 1 where it was 1, below where it was below"
            )
        if self.ema:
            load_strict(self.ema.module, checkpoint["model_ema"])
        self.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.batch, self.step = checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]
        self.max_accuracy, self.skipped_in_row = checkpoint["max_accuracy"], checkpoint["skipped_in_row"]
        if changed:
            self._move_to(self.batch * Layout(**saved).images_per_batch)
            logger.warning(
                "resumed with %s: the run goes on after as many images, at epoch %s batch %s, but its bits will differ "
                "from a run without a break", ", ".join(changed.values()), self.epoch, self.batch,
            )
        else:
            utils.set_rng_state(checkpoint["rng"][distributed.rank()])
        self.lr_scheduler.step_update(self.step)

    def _move_to(self, images_seen: int) -> None:
        """Goes to the last update of this layout at or before an image of the epoch."""
        accumulation = self.layout.accumulation_steps
        batches = self.layout.training_images // self.layout.images_per_batch
        updates = images_seen // self.layout.images_per_batch // accumulation
        self.batch = updates * accumulation
        self.step = self.epoch * -(-batches // accumulation) + updates
        utils.seed_everything(torch.initial_seed() + self.step)
