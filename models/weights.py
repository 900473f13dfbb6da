"""State dicts: the released network's keys to ours and back; loading weights into a model.

The released keys are those of the checkpoints that the paper's authors published. Only names differ, and the shapes of
the strip weights, (D*L, L, 1, K) there and (D, L, L, K) here, which are the same numbers in the same order.
"""

import re

import torch
from torch import nn

_RENAMES = (  # (ours, released); each applies to one place of a key
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
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # what DistributedDataParallel and torch.compile put before a key


def convert_released_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the released network under this project's keys and shapes."""
    converted = {}
    for key, value in state_dict.items():
        key = re.sub(r"^blocks(\d)\.", lambda match: f"stages.{int(match[1]) - 1}.", key)
        for ours, released in _RENAMES:
            if released in key:
                key = key.replace(released, ours, 1)
                break
        if key.endswith("_strip.weight"):  # (D*L, L, 1, K) -> (D, L, L, K)
            length, width = value.shape[1], value.shape[3]
            value = value.reshape(-1, length, length, width)
        converted[key] = value
    for key, value in converted.items():
        weight = converted.get(key.removesuffix("bias") + "weight")
        if key.endswith("_strip.bias") and weight is not None:  # (D*L) -> (D, L)
            converted[key] = value.reshape(weight.shape[:2])
    return converted


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
    """The network's weights in a checkpoint of either kind, or in a bare state dict, under this project's keys.

    Raises:
        ValueError: there are no weights in it.
    """
    state_dict = checkpoint.get("model", checkpoint)
    if not isinstance(state_dict, dict) or not any(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"no weights under 'model'; the entries are: {', '.join(map(str, checkpoint)) or 'none'}")
    state_dict = {_WRAPPERS.sub("", str(key)): value for key, value in state_dict.items()}
    is_released = any(key.startswith("blocks1.") for key in state_dict)
    return convert_released_state_dict(state_dict) if is_released else state_dict


def load_pretrained(model: nn.Module, checkpoint: dict) -> list[str]:
    """Loads a checkpoint's weights to start a training from.

    Everything must fit but a head of another class count, which keeps its newly drawn weights.

    Returns:
        The head's keys that were left out; empty when everything was loaded.

    Raises:
        ValueError: anything else is missing, unexpected or of another shape; every such key is listed.
    """
    state_dict = model_state_dict(checkpoint)
    own = model.state_dict()
    head = {name for name, module in model.named_modules() if module is model.get_classifier()}
    skipped = [
        key for key, value in state_dict.items()
        if key in own and key.rpartition(".")[0] in head and value.shape != own[key].shape
    ]
    load_strict(model, {key: own[key] if key in skipped else value for key, value in state_dict.items()})
    return skipped


def load_strict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """``model.load_state_dict`` whose error lists every missing key, unexpected key and differing shape.

    Raises:
        ValueError: the state dict does not fit; the model is left as it was.
    """
    own = model.state_dict()
    problems = [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state_dict]
    problems += [f"unexpected: {key}" for key in state_dict if key not in own]
    problems += [
        f"shape: {key} is {tuple(state_dict[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items() if key in state_dict and state_dict[key].shape != value.shape
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit the model in {len(problems)} places; check MODEL.STRIP_MLP.*, MODEL.NUM_CLASSES "
            "and DATA.IMG_SIZE against the run that wrote them:\n  " + "\n  ".join(problems)
        )
    model.load_state_dict(state_dict)
