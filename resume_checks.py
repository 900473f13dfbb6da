"""Checks of what a run's checkpoint holds: every entry, before anything is restored."""

import copy
import math
import random

import numpy as np
import torch

from config import from_dict
from models import check_fit, own_keys
from utils import InputError

MAX_EPOCHS = 1_000_000


def check_run(content: dict) -> None:
    """Raises InputError for a wrong entry among those that are read before the training is set up."""
    if "layout" not in content:  # not a training's checkpoint
        return
    kinds = {"layout": dict, "config": dict, "changes": list, "epoch": int, "step": int, "max_accuracy": int | float}
    for key, kind in kinds.items():
        if key not in content and key in ("epoch", "step", "max_accuracy"):
            raise InputError(f"the checkpoint cannot be resumed: it lacks {key}")
        if key in content and not isinstance(content[key], kind):
            raise InputError(f"its {key} is {content[key]!r:.60}, which no run writes")
    if "config" in content:
        from_dict(content["config"], "its config")
    for change in content.get("changes", []):
        keys = change.get("keys") if isinstance(change, dict) else None
        if not isinstance(keys, dict) or not all(isinstance(text, str) for pair in keys.items() for text in pair) \
                or type(change.get("step")) is not int:
            raise InputError(f"its changes hold {change!r:.60}, which no run writes")


def check_training(content: dict, state) -> dict[str, str]:
    """Checks every entry of a checkpoint that ``TrainState.load_state_dict`` restores: types, shapes, ranges.

    Returns:
        The changes of the layout, ``{"batch_size": "batch_size 128 -> 64"}``.

    Raises:
        InputError: the checkpoint lacks entries of a training, as released ones do, has an entry that
            ``TrainState.state_dict`` would not write, or is of another data set, network or optimiser.
    """
    missing = state.state_dict().keys() - content.keys() - {"best_loss"}
    if missing:
        raise InputError(
            f"the checkpoint cannot be resumed: it lacks {', '.join(sorted(missing))}; use --pretrained to start a new "
            "training from its weights, or --eval to evaluate it"
        )
    changed = _check_layout(content["layout"], vars(state.layout))
    _check_position(content, content["layout"])
    moved = changed.keys() - {"augment_on"}  # the others determine the order of the images
    if moved and content["batch"] and (content["layout"]["is_sharded"] or state.layout.is_sharded):
        raise InputError(f"cannot resume in the middle of an epoch: the data sharding changed "
                         f"({', '.join(changed.values())}). Resume with the old settings, or from a checkpoint at the "
                         "end of an epoch")
    if state.ema and content["model_ema"] is None:
        raise InputError("TRAIN.EMA.ENABLED is True but the checkpoint holds no average; resume with TRAIN.EMA.ENABLED "
                         "False")
    check_fit(state.model, own_keys(content["model"]))
    if state.ema:
        check_fit(state.ema.module, own_keys(content["model_ema"]))
    check_optimizer(content["optimizer"], state.optimizer)
    check_scaler(content["scaler"], state.scaler)
    _check_rng(content["rng"], content["layout"]["world_size"])
    return changed


def _check_layout(saved, own: dict) -> dict[str, str]:
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise InputError("the checkpoint was written by another version of this code (layout); use --pretrained")
    for key, value in own.items():
        fits = type(saved[key]) is type(value)
        if fits and type(value) is int:
            fits = (0 if key == "seed" else 1) <= saved[key] < 2**63
        if not fits:
            raise InputError(f"its layout's {key} is {saved[key]!r:.60}, which no run writes")
    changed = {key: f"{key} {str(saved[key])[:60]} -> {own[key]}" for key in own if saved[key] != own[key]}
    if changed.keys() & {"dataset", "training_images", "num_classes"}:
        raise InputError(
            f"the checkpoint was trained on another data set ({', '.join(changed.values())}); to train its weights "
            "on this one, use --pretrained and another --tag"
        )
    if saved["training_images"] < saved["batch_size"] * saved["world_size"]:
        raise InputError("its layout has fewer training_images than a batch over all processes")
    return changed


def _check_position(content: dict, layout: dict) -> None:
    """Epoch, batch and step must be a point between two updates of that layout."""
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
    best, loss = content["max_accuracy"], content.get("best_loss", math.inf)
    if type(best) not in (int, float) or not -1 <= best <= 100:
        raise InputError(f"its max_accuracy is {best!r:.60}; it must be a percentage, or -1 for none yet")
    if type(loss) is not float or math.isnan(loss):
        raise InputError(f"its best_loss is {loss!r:.60}; it must be a number, or inf for none yet")


def _check_rng(states, world_size: int) -> None:
    """Tries the random states of all processes on separate generators."""
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
        raise InputError(f"its rng holds an invalid random state ({str(error).splitlines()[0]:.100})") from error


def check_optimizer(saved, optimizer: torch.optim.Optimizer) -> None:
    """Checks a saved state of an optimiser: the same parameter groups, and for each parameter the entries after a step.

    Entries that this optimiser already has must be in it too: Adagrad, for example, creates them before any step.
    PyTorch's fused optimisers trust the shapes, and write beyond the end of an entry that is too short.
    """
    twin = copy.deepcopy(optimizer)  # what it holds after a step, here on gradients of zero, is listed nowhere
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()
    twin = twin.state_dict()
    groups, entries = (saved.get(key) for key in ("param_groups", "state")) if isinstance(saved, dict) else (None, None)
    ours = [(group.keys() | {"step"}, group["params"]) for group in twin["param_groups"]]  # timm's may count steps here
    is_like_ours = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) and set(map(type, group["params"])) <= {int}
        for group in groups)  # a tensor cannot be compared
    if not is_like_ours or ours != [(group.keys() | {"step"}, group["params"]) for group in groups]:
        raise InputError(
            "its optimizer is another one or has other parameter groups; set TRAIN.OPTIMIZER.NAME, TRAIN.FREEZE_STAGES "
            "and TRAIN.LAYER_DECAY to their old values, or start from its weights with --pretrained"
        )
    if not isinstance(entries, dict) or not entries.keys() <= {index for _, params in ours for index in params}:
        raise InputError("its optimizer's state is not a mapping from the numbers of its parameters")
    for index, entry in entries.items():
        _check_like(entry, twin["state"].get(index, {}), f"its optimizer's state of parameter {index}")
    missing = optimizer.state_dict()["state"].keys() - entries.keys()
    if missing:
        raise InputError(f"its optimizer's state lacks parameter {min(missing)}")
    for number, (group, own) in enumerate(zip(groups, twin["param_groups"], strict=True)):
        if "step" in group and "step" in own:
            _check_like(group["step"], own["step"], f"its optimizer's group {number}: step")


def check_scaler(saved, scaler: torch.amp.GradScaler) -> None:
    """Raises InputError if a saved state is not a GradScaler's; an empty one was saved without fp16."""
    own = scaler.state_dict()
    _check_like(saved, own if own and saved != {} else {}, "its scaler")


def _check_like(value, own, where: str) -> None:
    """Raises InputError unless a value has the type of this run's own, and the shape of a tensor, and is finite."""
    if type(own) in (dict, list, tuple) and type(value) is type(own):
        keys, others = (range(len(x)) if type(x) is not dict else sorted(x, key=str) for x in (value, own))
        if list(keys) != list(others):
            raise InputError(f"{where} does not hold {', '.join(map(str, others)) or 'nothing'}")
        for key in keys:
            _check_like(value[key], own[key], f"{where}: {key}")
        return
    is_tensor = isinstance(own, torch.Tensor)
    if type(value) is not type(own) or is_tensor and (value.shape, value.dtype) != (own.shape, own.dtype):
        found = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        wanted = f"{tuple(own.shape)} of {own.dtype}" if is_tensor else type(own).__name__
        raise InputError(f"{where} is {found}, but must be {wanted}")
    if is_tensor or type(own) in (int, float):
        number = torch.as_tensor(value, dtype=None if is_tensor else torch.float64)
        key = where.rpartition(" ")[2]
        is_sane = number >= 0 if key == "step" or "sq" in key else number.isfinite()  # squares overflow first
        if not is_sane.all() or type(own) is int and not 0 <= value < 2**31:
            raise InputError(f"{where} is not finite, below 0 or too large")
