"""State dicts: converting released keys to ours and back, resizing to other input sizes, loading into a model.

The released keys are those of the checkpoints that the paper's authors published. Only the names differ, and the shapes
of the strip weights: (D*L, L, 1, K) there and (D, L, L, K) here, with the same numbers in the same order.

A network is built for one input size. ``adapt_size`` resizes its weights for another one: a strip layer then resizes
its tokens to the old length, computes the same as before, and resizes the result to the new length. That is again a
strip layer, with weight ``R(old -> new) @ Wt[d, :, :, k] @ R(new -> old)`` and bias ``R(old -> new) @ b[d]``, where R
is the matrix of linear resizing (token centres at half-integers; antialiased when shrinking). The rows of R add up to
1, so the sum over a strip keeps its scale. K does not change. The entries of a position table are the offsets -H to W;
the negative offsets are stretched by H over the old H, the positive ones by W over the old W.
"""

import logging
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger("strip_mlp.weights")

_RENAMES = (  # (ours, released); each applies to one part of a key
    ("stem.", "patch_embed."),
    (".token_mixing.conv_norm.", ".token_mixing.dwsc.conv_merge.BN."),
    (".token_mixing.conv.", ".token_mixing.dwsc.conv_merge.Conv."),
    (".token_mixing.proj_in.", ".token_mixing.smlp_block.mlp.0."),
    (".token_mixing.proj_norm.", ".token_mixing.smlp_block.mlp.1."),
    (".token_mixing.cgsmm.row_position.table", ".token_mixing.smlp_block.relate_pos_h.embeddings_table"),
    (".token_mixing.cgsmm.row_strip.", ".token_mixing.smlp_block.proj_h."),
    (".token_mixing.cgsmm.row_fuse.", ".token_mixing.smlp_block.fuse_h."),
    (".token_mixing.cgsmm.norm.", ".token_mixing.smlp_block.BN."),
    (".token_mixing.cgsmm.column_position.table", ".token_mixing.smlp_block.relate_pos_w.embeddings_table"),
    (".token_mixing.cgsmm.column_strip.", ".token_mixing.smlp_block.proj_w."),
    (".token_mixing.cgsmm.column_strip.", ".token_mixing.smlp_block.proh_w."),  # MLP-DINO's spelling, only for reading
    (".token_mixing.cgsmm.column_fuse.", ".token_mixing.smlp_block.fuse_w."),
    (".token_mixing.lsmm.row_conv.", ".token_mixing.smlp_block.fc_h."),
    (".token_mixing.lsmm.column_conv.", ".token_mixing.smlp_block.fc_w."),
    (".token_mixing.lsmm.reweight_fc1.", ".token_mixing.smlp_block.reweight.fc1."),
    (".token_mixing.lsmm.reweight_fc2.", ".token_mixing.smlp_block.reweight.fc2."),
    (".token_mixing.proj_out.", ".token_mixing.smlp_block.fuse."),
    (".channel_mixing.conv.", ".channel_mixing.conv_77."),
    (".channel_mixing.norm.", ".channel_mixing.layer_norm."),
    ("merging.0.", "merging1."),
    ("merging.1.", "merging2."),
    ("merging.2.", "merging3."),
    ("shortcut_m1.", "conv_s1_28."),
    ("shortcut_s.", "conv_s1_14."),
    ("shortcut_m2.", "conv_s2_14."),
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHTS = ("model", "state_dict", "model_state_dict", "network", "net", "weights")  # where trainers keep them
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "timm_model.")  # of DDP, torch.compile, Lightning, ...
_COUNTERS = re.compile(r"(^n_averaged|total_ops|total_params)$")  # keys that AveragedModel and thop add

# timm reads checkpoints with torch.load, which would reject the pickled config of a released one.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])


def convert_released_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the released network under this project's keys and shapes."""
    converted = {}
    for key, value in state_dict.items():
        key = re.sub(r"^blocks(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.", key)
        for ours, released in _RENAMES:
            if released in key:
                key = key.replace(released, ours, 1)
                break
        length = value.shape[1] if value.ndim == 4 else 0
        if key.endswith("_strip.weight") and length and value.shape[0] % length == 0:  # otherwise it fits no network
            value = value.squeeze(2).unflatten(0, (value.shape[0] // length, length))  # (D*L, L, 1, K) -> (D, L, L, K)
        converted[key] = value
    for key, value in converted.items():
        weight = converted.get(key.removesuffix("bias") + "weight")
        if key.endswith("_strip.bias") and weight is not None and value.numel() == weight.shape[:2].numel():
            converted[key] = value.reshape(weight.shape[:2])  # (D*L) -> (D, L)
    return converted


def own_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with our or the released keys, under this project's."""
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        return state_dict  # for check_fit to say what is wrong
    is_released = any(str(key).startswith("blocks1.") for key in state_dict)
    return convert_released_state_dict(state_dict) if is_released else state_dict


def to_released_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of ``convert_released_state_dict``."""
    converted = {}
    for key, value in state_dict.items():
        if key.endswith("_strip.weight"):  # (D, L, L, K) -> (D*L, L, 1, K)
            value = value.flatten(0, 1).unsqueeze(2)
        elif key.endswith("_strip.bias"):
            value = value.flatten()
        key = re.sub(r"^stages\.(\d)\.", lambda match: f"blocks{int(match[1]) + 1}.", key)
        for ours, released in _RENAMES:
            if ours in key:
                key = key.replace(ours, released, 1)
                break
        converted[key] = value
    return converted


def model_state_dict(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The network's weights in a checkpoint, or in a bare state dict, under this project's keys.

    Checkpoints of timm, torchvision, Lightning and mmpretrain load too: their wrappers' prefixes are stripped, and what
    stands beside the network's weights is left out.

    Raises:
        ValueError: it has no weights.
    """
    weights = _find(checkpoint, _WEIGHTS) or _find(checkpoint, _AVERAGES)
    if weights is None:
        if not isinstance(checkpoint.get("model", {}), dict):
            raise ValueError("its model is not a state dict but a whole pickled network or something else, which is "
                             "not loaded; save network.state_dict()")
        raise ValueError(f"no weights under {', '.join(_WEIGHTS)}; the entries are: "
                         f"{', '.join(map(str, list(checkpoint)[:20])) or 'none'}")
    return _under_own_keys(weights)


def average_state_dict(checkpoint: dict) -> dict[str, torch.Tensor] | None:
    """The exponential moving average of the weights in a checkpoint, beside its weights; None if it has none."""
    weights, average = _find(checkpoint, _WEIGHTS), _find(checkpoint, _AVERAGES)
    return _under_own_keys(average) if weights and average else None


def _find(checkpoint: dict, names: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """The tensors in the first entry of these names that has some; a bare state dict counts as ``model``."""
    for entry in (*map(checkpoint.get, names), *([checkpoint] if names is _WEIGHTS else [])):
        if isinstance(entry, dict):
            tensors = {key: value for key, value in entry.items() if isinstance(value, torch.Tensor)}
            if tensors or entry is not checkpoint and (tensors := _find(entry, names)):
                return tensors
    return None


def _under_own_keys(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state_dict = {str(key): value for key, value in state_dict.items() if not _COUNTERS.search(str(key))}
    while wrapper := _wrapper(state_dict):  # what is not within the wrapped network is its trainer's
        state_dict = {key.removeprefix(wrapper): value for key, value in state_dict.items() if key.startswith(wrapper)}
    return own_keys(state_dict)


def _wrapper(state_dict: dict[str, torch.Tensor]) -> str:
    """The prefix of the network's keys if it is wrapped in other modules, e.g. ``"module."``, else an empty string."""
    prefixes = {key[:key.find(".") + 1] for key in state_dict}
    if len(prefixes) == 1 and len(state_dict) > 1:
        return prefixes.pop()
    return next((prefix for prefix in _WRAPPERS if prefix in prefixes), "")


def fit_state_dict(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Converts a state dict with our or the released keys for a model, which may have another input size."""
    return adapt_size(_under_own_keys(state_dict), model)


def adapt_size(state_dict: dict[str, torch.Tensor], model: nn.Module, warn: bool = True) -> dict[str, torch.Tensor]:
    """A network's weights for the input size of ``model``, by the interpolation described at the top of this file.

    If the weights have that size already, or fit no size, they are returned unchanged. Otherwise a warning is logged,
    unless ``warn`` is False.
    """
    own, adapted, sizes = model.state_dict(), dict(state_dict), []
    for key in own:
        if not key.endswith("cgsmm.row_strip.weight"):
            continue
        cgsmm = key.removesuffix("row_strip.weight")
        old, new = _map_size(state_dict, cgsmm), _map_size(own, cgsmm)
        if old is None or old == new:
            continue
        sizes.append((old, new))
        host = "meta" if state_dict[key].is_meta else "cpu"  # a network on the meta device has only shapes
        for axis, side in (("row", 1), ("column", 0)):
            spread, gather = _resizing(old[side], new[side]).to(host), _resizing(new[side], old[side]).to(host)
            for name, equation, matrices in (
                ("weight", "aj,djik,ib->dabk", (spread, gather)), ("bias", "aj,dj->da", (spread,)),
            ):
                value = state_dict[f"{cgsmm}{axis}_strip.{name}"]
                result = torch.einsum(equation, matrices[0], value.to(host).double(), *matrices[1:])
                adapted[f"{cgsmm}{axis}_strip.{name}"] = result.to(value)
            table = state_dict[f"{cgsmm}{axis}_position.table"]
            adapted[f"{cgsmm}{axis}_position.table"] = _resize_table(table.to(host).double(), old, new).to(table)
    if sizes and warn:
        (old, new), count = sizes[0], len(sizes)
        logger.warning(
            f"the weights are for another input size: the strip layers and position tables of {count} blocks are "
            f"interpolated, in the first one from {old[0]}x{old[1]} to {new[0]}x{new[1]} tokens; fine-tune the network "
            "to regain accuracy"
        )
    return adapted


def _map_size(weights: dict[str, torch.Tensor], cgsmm: str) -> tuple[int, int] | None:
    """(H, W) of the feature map that a CGSMM's weights are for; None if they contradict one another."""
    axes = ("row", "column")
    names = [f"{cgsmm}{axis}{end}" for end in ("_strip.weight", "_strip.bias", "_position.table") for axis in axes]
    if not all(name in weights for name in names):
        return None
    shapes = [tuple(weights[name].shape) for name in names]
    if [len(shape) for shape in shapes] != [4, 4, 2, 2, 2, 2]:
        return None
    (d, width, _, k), (_, height, _, _), *_, (_, c) = shapes
    if 0 in (d, width, height, k, c):
        return None
    expected = [(d, width, width, k), (d, height, height, k), (d, width), (d, height), *[(height + width + 1, c)] * 2]
    return (height, width) if shapes == expected else None


def _resizing(old: int, new: int) -> torch.Tensor:
    """The (new, old) matrix that resizes ``old`` tokens to ``new`` tokens."""
    unit = torch.eye(old, dtype=torch.float64)[None, None]
    return F.interpolate(unit, size=(new, old), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def _resize_table(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """(old H + old W + 1, C) -> (H + W + 1, C)"""
    (old_height, old_width), (height, width) = old, new
    offsets = torch.arange(-height, width + 1, dtype=torch.float64)
    offsets *= torch.where(offsets < 0, old_height / height, old_width / width)
    # The outermost entries are never read, so never trained.
    position = (offsets.clamp(1 - old_height, old_width - 1) + old_height).to(table.device)
    below = position.floor().long()
    return torch.lerp(table[below], table[below + 1], (position - below)[:, None])


def load_pretrained(model: nn.Module, checkpoint: dict) -> list[str]:
    """Loads a checkpoint's weights as the start of a training.

    Weights for another input size are resized. If the class count differs, or the checkpoint is a backbone without a
    head, the head keeps its new initialisation, and its keys are returned. Everything else must pass ``check_fit``.
    """
    state_dict = adapt_size(model_state_dict(checkpoint), model)
    own = model.state_dict()
    head = {name for name, module in model.named_modules() if module is model.get_classifier()}
    skipped = [key for key in own if key.rpartition(".")[0] in head
               and (key not in state_dict or state_dict[key].shape != own[key].shape)]
    load_strict(model, state_dict | {key: own[key] for key in skipped})
    return skipped


def load_strict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """``model.load_state_dict`` after ``check_fit``; if that raises ValueError, the model is not changed."""
    check_fit(model, state_dict)
    model.load_state_dict(state_dict)


def check_fit(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless a state dict fits this model, which may be on the meta device.

    The error lists up to 100 missing keys, unexpected keys and differing shapes, or names a tensor that is not
    floating-point though the model's is, or that holds a value that is not finite or a variance below 0.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"the weights are {type(state_dict).__name__}, not a state dict")
    own = model.state_dict()
    problems = [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state_dict]
    problems += [f"unexpected: {key}" for key in state_dict if key not in own]
    shared = [key for key in own if key in state_dict]
    problems += [f"not a tensor: {key}" for key in shared if not isinstance(state_dict[key], torch.Tensor)]
    problems += [
        f"shape: {key} is {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in shared if isinstance(state_dict[key], torch.Tensor) and state_dict[key].shape != own[key].shape
    ]
    if problems:
        shown = problems[:100] + [f"... and {len(problems) - 100} more"] * (len(problems) > 100)
        raise ValueError(
            f"the weights do not fit the model in {len(problems)} places; check MODEL.STRIP_MLP.*, MODEL.NUM_CLASSES "
            "and DATA.IMG_SIZE against the run that wrote them:\n  " + "\n  ".join(shown)
        )
    for key, value in state_dict.items():
        if own[key].is_floating_point():
            if value.dtype not in _FLOATS:
                raise ValueError(f"the weights must be floating point, but {key} is {value.dtype}")
            if not value.to(own[key].dtype).isfinite().all():
                raise ValueError(f"the weights are not finite: {key} holds nan or inf; use an earlier checkpoint")
            if key.endswith("running_var") and (value < 0).any():
                raise ValueError(f"the weights are invalid: {key} holds a variance below 0")
        elif value.dtype != own[key].dtype:
            raise ValueError(f"the weights do not fit the model: {key} has the type {value.dtype}, not "
                             f"{own[key].dtype}")
