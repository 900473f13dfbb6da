"""Whether a run goes on as it began: its config compared with the one that its checkpoint was trained with."""

from pathlib import Path

from config import flat_config, flat_keys
from models import InputError

# Keys that change neither the network nor what it learns: where, how fast and in what portions a run computes. Of a
# batch of another size TrainState says how the run goes on.
FREE_KEYS = {
    "BASE", "MODEL.NAME", "OUTPUT", "TAG", "PRINT_FREQ", "SAVE_FREQ", "SAVE_STEPS", "SAVE_MINUTES",
    "KEEP_CHECKPOINTS", "AMP_DTYPE", "COMPILE", "DETERMINISTIC", "DATA.DATA_PATH", "DATA.BATCH_SIZE",
    "DATA.ZIP_MODE", "DATA.CACHE_MODE", "DATA.NUM_WORKERS", "DATA.MIRROR", "DATA.SKIP_BAD_IMAGES", "HANG_MINUTES",
    "MODEL.RESUME", "TRAIN.ACCUMULATION_STEPS", "TRAIN.AUTO_RESUME", "TRAIN.USE_CHECKPOINT", "TRAIN.MAX_SKIPPED",
    "TEST.PREDICTIONS", "TEST.FUSE", "WANDB_PROJECT", "MODEL.STRIP_MLP.FORM",
}
# Keys that no run can change on its way, because its weights, or its classes, would not fit.
_FIXED = ("MODEL.TYPE", "MODEL.ARCH", "MODEL.TIMM_KWARGS", "MODEL.NUM_CLASSES", "MODEL.STRIP_MLP.", "DATA.DATASET",
          "DATA.IMG_SIZE", "DATA.HOLD_OUT")


def changed_keys(saved: dict, config) -> dict[str, str]:
    """``{"TRAIN.EPOCHS": "2 -> 4"}``: the keys that decide on what is learnt and are not as in a saved config."""
    before, now = flat_config(saved), flat_keys(config)
    return {key: f"{before[key]!r} -> {now[key]!r}" for key in now if key not in FREE_KEYS and before[key] != now[key]}


def accept_changes(content: dict, path: Path, config, allow_changes: bool) -> list[dict]:
    """The changes of settings on a run's way, ``[{"step": 7, "keys": {"TRAIN.EPOCHS": "2 -> 4"}}]``, this start's last.

    Args:
        content: the checkpoint to resume.
        path: where it lies.
        config: the config to resume with.
        allow_changes: whether keys may change that the weights do not depend on.

    Raises:
        InputError: the config is not the one that the checkpoint was trained with, and may not be another.
    """
    keys, changes = changed_keys(content["config"], config), content.get("changes", [])
    named = ", ".join(f"{key} {change}" for key, change in keys.items())
    if any(key.startswith(_FIXED) for key in keys):
        raise InputError(f"{path} is from a run with another network or data set: {named}. Give the new run another "
                         "--tag; --pretrained starts it from these weights")
    if keys and not allow_changes:
        raise InputError(f"{path} is from a run with other settings: {named}. Give the new run another --tag, or add "
                         "--allow-changes to resume this one with the new settings, which run.yaml then records")
    return changes + [{"step": content["step"], "keys": keys}] if keys else changes
