"""What determines the rest of a training: the one list that a checkpoint saves and a resume restores."""

from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import utils
from models import load_strict, model_state_dict


@dataclass
class TrainState:
    """A training between two updates."""

    model: nn.Module  # bare: not wrapped for distribution
    optimizer: torch.optim.Optimizer
    lr_scheduler: LambdaLR
    scaler: torch.amp.GradScaler  # disabled but for fp16
    ema: ModelEmaV3 | None
    epoch: int = 0  # the epoch in progress, or next
    batch: int = 0  # micro-batches of that epoch already trained, per process
    step: int = 0  # updates done
    max_accuracy: float = 0.0  # best top-1 so far, in percent

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
            "rng": utils.gather_objects(utils.get_rng_state()),
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: an entry is missing (as in a released checkpoint, which holds no whole training), or does not
                fit this run.
        """
        missing = self.state_dict().keys() - checkpoint.keys()
        if missing:
            raise ValueError(
                f"the checkpoint cannot be resumed, it lacks {', '.join(sorted(missing))}; to start a new training from "
                "its weights use --pretrained, to evaluate it --eval"
            )
        if len(checkpoint["rng"]) != utils.world_size():
            raise ValueError(
                f"the checkpoint was written by {len(checkpoint['rng'])} processes and this run has "
                f"{utils.world_size()}; resume with as many"
            )
        if self.ema and checkpoint["model_ema"] is None:
            raise ValueError("TRAIN.EMA.ENABLED is True but the checkpoint holds no average; resume with it False")
        load_strict(self.model, model_state_dict(checkpoint))
        if self.ema:
            load_strict(self.ema.module, checkpoint["model_ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.batch, self.step = checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]
        self.max_accuracy = checkpoint["max_accuracy"]
        utils.set_rng_state(checkpoint["rng"][utils.rank()])
