"""Whether a training can resume from a checkpoint; every entry is checked before anything of the training changes."""

import random

import numpy as np
import torch

from models import InputError, check_fit, model_state_dict

MAX_EPOCHS = 1_000_000
_OPTIMIZER_STATE = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.SGD: {"momentum_buffer"}}
_NOT_NEGATIVE = ("step", "exp_avg_sq")  # and may be infinite, where a gradient was huge


def check_training(content: dict, state) -> dict[str, str]:
    """Checks every entry that ``TrainState.load_state_dict`` restores: types, shapes, lengths, ranges, and the run.

    Args:
        content: a checkpoint, of whatever values.
        state: the TrainState that is to be restored.

    Returns:
        What of the layout has changed since, ``{"batch_size": "batch_size 128 -> 64"}``.

    Raises:
        InputError: the checkpoint holds no whole training, as a released one does not, an entry that
            ``TrainState.state_dict`` would not write, or the training of another data set, network or optimiser.
    """
    missing = state.state_dict().keys() - content.keys()
    if missing:
        raise InputError(
            f"the checkpoint cannot be resumed, it lacks {', '.join(sorted(missing))}; to start a new training "
            "from its weights use --pretrained, to evaluate it --eval"
        )
    changed = _check_layout(content["layout"], vars(state.layout))
    _check_position(content, content["layout"])
    moved = changed.keys() - {"augment_on"}  # the rest decides which image comes when
    if moved and content["batch"] and (content["layout"]["is_sharded"] or state.layout.is_sharded):
        raise InputError(
            f"the checkpoint is from the middle of an epoch over shards of the images, which changed "
            f"({', '.join(changed.values())}), so that what is left of the epoch is not defined; resume as before, "
            "or from a checkpoint at the end of an epoch"
        )
    _check_optimizer_groups(content["optimizer"], state.optimizer)
    if state.ema and content["model_ema"] is None:
        raise InputError("TRAIN.EMA.ENABLED is True but the checkpoint holds no average; resume with it False")
    check_fit(state.model, model_state_dict(content))
    if state.ema:
        check_fit(state.ema.module, model_state_dict({"model": content["model_ema"]}))
    _check_optimizer_state(content["optimizer"], state.optimizer)
    _check_scaler(content["scaler"], state.scaler)
    _check_rng(content["rng"], content["layout"]["world_size"])
    return changed


def _check_layout(saved, own: dict) -> dict[str, str]:
    if isinstance(saved, dict):
        saved = {"augment_on": "worker"} | saved  # what checkpoints without the key were trained with
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise InputError("the checkpoint was written by another version of this code (layout); use --pretrained")
    for key, value in own.items():
        fits = type(saved[key]) is type(value)
        if fits and type(value) is int:
            fits = (0 if key == "seed" else 1) <= saved[key] < 2**63
        if not fits:
            raise InputError(f"its layout's {key} is {saved[key]!r:.60}")
    changed = {key: f"{key} {str(saved[key])[:60]} -> {own[key]}" for key in own if saved[key] != own[key]}
    if changed.keys() & {"dataset", "training_images", "num_classes"}:
        raise InputError(
            f"the checkpoint was trained on another data set ({', '.join(changed.values())}); to train its weights "
            "on this one use --pretrained and another --tag"
        )
    if saved["training_images"] < saved["batch_size"] * saved["world_size"]:
        raise InputError("its layout has fewer training_images than a batch over all processes")
    return changed


def _check_position(content: dict, layout: dict) -> None:
    """Epoch, batch and step must be a place between two updates of that layout."""
    batches = layout["training_images"] // (layout["batch_size"] * layout["world_size"])
    accumulation = layout["accumulation_steps"]
    for key, highest in (("epoch", MAX_EPOCHS), ("batch", batches), ("step", 2**62), ("skipped_in_row", 2**62)):
        if type(content[key]) is not int or not 0 <= content[key] <= highest:
            raise InputError(f"its {key} is {content[key]!r:.60}; it must be a number from 0 to {highest}")
    epoch, batch, step = content["epoch"], content["batch"], content["step"]
    if batch % accumulation and batch != batches:
        raise InputError(f"its batch is {batch}, in the middle of an update of {accumulation} micro-batches")
    expected = epoch * -(-batches // accumulation) + -(-batch // accumulation)
    if step != expected:
        raise InputError(f"its step is {step}, but epoch {epoch} and batch {batch} come after {expected} updates")
    best = content["max_accuracy"]
    if type(best) not in (int, float) or not -1 <= best <= 100:
        raise InputError(f"its max_accuracy is {best!r:.60}; it must be a percentage, or -1 for none yet")


def _check_scaler(saved, scaler: torch.amp.GradScaler) -> None:
    if not isinstance(saved, dict):
        raise InputError(f"its scaler is {type(saved).__name__}, not a mapping")
    for key, own in scaler.state_dict().items() if saved else ():  # empty: saved without fp16
        value = saved.get(key)
        limit = 2**31 if type(own) is int else 1e38
        if type(value) is not type(own) or not 0 <= value < limit or own > 0 and value == 0:
            raise InputError(f"its scaler's {key} is {value!r:.60}")


def _check_rng(states, world_size: int) -> None:
    """Tries the random states of all processes on generators that nobody else uses."""
    if not isinstance(states, list) or len(states) != world_size:
        raise InputError(f"its rng is not a list of {world_size} random states, one for each process")
    try:
        for state in states:
            random.Random().setstate(state["python"])
            if not isinstance(state["python"][2], float | None):  # which Python does not check
                raise TypeError("Python's is not one")
            name, keys, position, *rest = state["numpy"]
            if not 0 <= int(keys.min()) <= int(keys.max()) < 2**32 or not 0 <= position <= 624:  # nor NumPy
                raise ValueError("NumPy's is out of range")
            np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), position, *rest))
            torch.Generator().set_state(state["torch"])
            if state["cuda"] is not None and torch.cuda.is_initialized():
                torch.Generator("cuda").set_state(state["cuda"])
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"its rng holds what is no random state ({str(error).splitlines()[0]:.100})") from error


def _check_optimizer_groups(saved, optimizer: torch.optim.Optimizer) -> None:
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise InputError("its optimizer has no param_groups")
    own = optimizer.param_groups[0].keys() | {"step"}  # which some of timm's count here, from the first update on
    if any(group.keys() | {"step"} != own for group in groups):
        raise InputError(
            "the checkpoint was written with another optimiser, or by another version of this code; set "
            "TRAIN.OPTIMIZER.NAME to it, or start from its weights with --pretrained"
        )


def _check_optimizer_state(saved: dict, optimizer: torch.optim.Optimizer) -> None:
    """The groups hold as many parameters as this optimiser's, and each one's entry is of its shape and type.

    PyTorch's fused optimisers trust that, and write beyond the end of an entry that is too short. Of timm's, which are
    written in Python, the entries are of many kinds and not checked.
    """
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
        raise InputError(
            "the checkpoint was written with other parameter groups; set TRAIN.FREEZE_STAGES as it was, and "
            "TRAIN.LAYER_DECAY to 1 where it was 1, below where it was below"
        )
    parameters = [parameter for group in groups for parameter in group["params"]]
    if [index for group in saved_groups for index in group["params"]] != list(range(len(parameters))):
        raise InputError("its optimizer numbers the parameters in another order")
    entries, expected = saved.get("state"), _OPTIMIZER_STATE.get(type(optimizer))
    if not isinstance(entries, dict) or not entries.keys() <= set(range(len(parameters))):
        raise InputError("its optimizer's state is not a mapping from the numbers of its parameters")
    for index, entry in entries.items():
        where = f"its optimizer's state of parameter {index}"
        if not isinstance(entry, dict):
            raise InputError(f"{where} is no mapping")
        if expected is None:
            continue
        if entry.keys() != expected:
            raise InputError(f"{where} does not hold {', '.join(sorted(expected))}")
        for key, value in entry.items():
            _check_moment(value, key, parameters[index], f"{where}: {key}")


def _check_moment(value, key: str, parameter: torch.Tensor, where: str) -> None:
    shape = () if key == "step" else parameter.shape
    if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != parameter.dtype:
        found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"{where} is {found}, but must be {tuple(shape)} of {parameter.dtype}")
    if not (value >= 0 if key in _NOT_NEGATIVE else value.isfinite()).all():
        raise InputError(f"{where} is not finite or is below 0")
