"""The learning rate, a pure function of the update step."""

import math

from torch.optim import Optimizer


def learning_rate(config, step: int, steps_per_epoch: int) -> float:
    """The learning rate of update ``step``, counted from 0.

    A linear warm-up from WARMUP_LR to BASE_LR, then by LR_SCHEDULER.NAME: ``cosine`` decays to MIN_LR, with a half
    period from step 0 to the end of the training; ``linear`` decays to MIN_LR; ``step`` multiplies by DECAY_RATE every
    DECAY_EPOCHS after the warm-up.
    """
    train, decay = config.TRAIN, config.TRAIN.LR_SCHEDULER
    total, warmup = train.EPOCHS * steps_per_epoch, train.WARMUP_EPOCHS * steps_per_epoch
    if step < warmup:
        return train.WARMUP_LR + (train.BASE_LR - train.WARMUP_LR) * step / warmup
    if decay.NAME == "step":
        return train.BASE_LR * decay.DECAY_RATE ** ((step - warmup) // (decay.DECAY_EPOCHS * steps_per_epoch))
    if decay.NAME == "linear":
        share_left = 1 - (step - warmup) / max(total - warmup, 1)
    else:
        share_left = (1 + math.cos(math.pi * step / total)) / 2
    return train.MIN_LR + (train.BASE_LR - train.MIN_LR) * (share_left if step < total else 0)


class LRScheduler:
    """Gives every parameter group the learning rate of the next update, times its ``lr_scale`` if it has one."""

    def __init__(self, config, optimizer: Optimizer, steps_per_epoch: int):
        self.config, self.optimizer, self.steps_per_epoch = config, optimizer, steps_per_epoch
        self.step_update(0)

    def step_update(self, step: int) -> None:
        """Sets the learning rate of update ``step``, counted from 0."""
        self.step, self.lr = step, learning_rate(self.config, step, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)

    def state_dict(self) -> dict:
        """The step, which determines everything else, and the learning rate."""
        return {"step": self.step, "lr": self.lr}
