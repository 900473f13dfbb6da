"""Whether a run resumes with its own settings: its config is compared with that of its checkpoint."""

from pathlib import Path

from config import flat_config, flat_keys
from models import InputError

# Keys that change neither the network nor what it learns: where, how fast and in what portions a run computes.
# TrainState explains how a run resumes with another batch size.
FREE_KEYS = {
    "BASE", "MODEL.NAME", "OUTPUT", "TAG", "PRINT_FREQ", "SAVE_FREQ", "SAVE_STEPS", "SAVE_MINUTES",
    "KEEP_CHECKPOINTS", "AMP_DTYPE", "COMPILE", "DETERMINISTIC", "DATA.DATA_PATH", "DATA.BATCH_SIZE",
    "DATA.ZIP_MODE", "DATA.CACHE_MODE", "DATA.NUM_WORKERS", "DATA.MIRROR", "DATA.SKIP_BAD_IMAGES", "HANG_MINUTES",
    "MODEL.RESUME", "TRAIN.ACCUMULATION_STEPS", "TRAIN.AUTO_RESUME", "TRAIN.USE_CHECKPOINT", "TRAIN.MAX_SKIPPED",
    "TEST.PREDICTIONS", "TEST.FUSE", "WANDB_PROJECT", "MODEL.STRIP_MLP.FORM",
}
# Keys that a run cannot change on resume, because its weights or its classes would not fit.
_FIXED = ("MODEL.TYPE", "MODEL.ARCH", "MODEL.TIMM_KWARGS", "MODEL.NUM_CLASSES", "MODEL.STRIP_MLP.", "DATA.DATASET",
          "DATA.IMG_SIZE", "DATA.HOLD_OUT")


def changed_keys(saved: dict, config) -> dict[str, str]:
    """``{"TRAIN.EPOCHS": "2 -> 4"}``: the keys that affect what is learnt and differ from a saved config."""
    before, now = flat_config(saved), flat_keys(config)
    return {key: f"{before[key]!r} -> {now[key]!r}" for key in now if key not in FREE_KEYS and before[key] != now[key]}


def accept_changes(content: dict, path: Path, config, allow_changes: bool) -> list[dict]:
    """All changes of a run's settings, ``[{"step": 7, "keys": {"TRAIN.EPOCHS": "2 -> 4"}}]``, those of this start last.

    Args:
        content: the checkpoint to resume.
        path: its path.
        config: the config to resume with.
        allow_changes: whether keys that the weights do not depend on may change.

    Raises:
        InputError: the config differs from the one that the checkpoint was trained with, and may not.
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
