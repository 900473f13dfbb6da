"""What is accepted from an untrusted checkpoint: plain values of bounded size, and an architecture.

A checkpoint's config determines the network and the preparation of its images. It cannot name a file, an address or
weights, and the bounds below limit every loop and allocation that depends on it.
"""

import re

import torch
import yaml
from torch import nn

from config import from_dict
from models import InputError

MAX_DEPTH = 32  # of containers in containers
MAX_ENTRIES = 1_000_000  # a training on 1,000 processes, mostly their random states, has fewer
MAX_TEXT = 500  # characters of a key, a config value or a class name
MAX_ELEMENTS = 2_000_000_000  # of a network's parameters and buffers

_SCALARS = (type(None), bool, float, complex, str, torch.dtype, torch.device)
_SIZES = {  # of other numbers: 65,536
    "DATA.IMG_SIZE": 4096, "MODEL.STRIP_MLP.TRAINED_IMG_SIZE": 4096, "MODEL.NUM_CLASSES": 10**6,
}
_CHOSEN_BY_CHECKPOINTS = {"DATA": ("DATASET", "IMG_SIZE", "INTERPOLATION"), "TEST": ("CROP",)}
_CHOSEN_BY_USERS = ("PRETRAINED", "RESUME")  # of MODEL; its other keys, except STRIP_MLP.FORM, are the architecture
_TIMM_ARGUMENTS = {  # the arguments of timm's networks that a checkpoint may set, and the largest number in each
    **dict.fromkeys("depth depths layers".split(), 256),
    **dict.fromkeys("img_size patch_size window_size in_chans output_stride".split(), 4096),
    **dict.fromkeys("embed_dim embed_dims dims channels stem_width stem_chs width base_width".split(), 65536),
    **dict.fromkeys("cardinality num_heads num_features head_dim mlp_ratio mlp_ratios expand_ratio".split(), 65536),
    **dict.fromkeys("drop_rate drop_path_rate proj_drop_rate attn_drop_rate".split(), 1),
    **dict.fromkeys("init_values ls_init_value qkv_bias class_token avg_down conv_mlp reduce_first".split(), 1),
    **dict.fromkeys("stem_type global_pool act_layer norm_layer".split(), 0),
}
_WORD = re.compile(r"\w{0,40}", re.ASCII)


def plain(content, tensor_bytes: int):
    """The same content in plain containers, its tensors reduced to their numbers.

    Args:
        content: the content of a file.
        tensor_bytes: the most memory that its tensors may take.

    Raises:
        InputError: it is nested too deep, has too many entries or too large tensors, a tensor that is not dense and on
            the CPU, or a value other than tensors, numbers and text.
    """
    entries = 0

    def visit(value, depth: int):
        nonlocal entries, tensor_bytes
        entries += 1
        if entries > MAX_ENTRIES:
            raise InputError(f"it has more than {MAX_ENTRIES} entries")
        if depth > MAX_DEPTH:
            raise InputError(f"its entries are nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            return {_plain_key(key): visit(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(visit(item, depth + 1) for item in value)
        if isinstance(value, torch.Tensor):
            _check_tensor(value)
            tensor_bytes -= value.numel() * value.element_size()
            if tensor_bytes < 0:
                raise InputError("its tensors are larger than the file that holds them")
            return value.detach().clone()  # in memory of its own
        if type(value) in _SCALARS or type(value) is int and abs(value) < 2**64:
            return value
        raise InputError(f"it holds an entry of the type {type(value).__name__}, which no checkpoint needs")

    return visit(content, 0)


def architecture(values: dict, source: str):
    """The config with the architecture of a checkpoint's config and defaults for everything else.

    Args:
        values: nested dictionaries, as ``plain`` gives them.
        source: what error messages call them.

    Raises:
        InputError: an unknown key, or a value that is out of range or that a checkpoint may not set; the key is named.
    """
    model = values.get("MODEL")
    if not isinstance(model, dict):
        raise InputError(f"{source} does not describe a network: it has no group MODEL")
    chosen = {"MODEL": {key: value for key, value in model.items() if key not in _CHOSEN_BY_USERS}}
    for group, keys in _CHOSEN_BY_CHECKPOINTS.items():
        found = values.get(group, {})
        if not isinstance(found, dict):
            raise InputError(f"{source}: {group} is {_short(found)}, not a group of keys")
        chosen[group] = {key: found[key] for key in keys if key in found}
    if isinstance(model.get("STRIP_MLP"), dict):  # the best form depends on the machine
        chosen["MODEL"]["STRIP_MLP"] = {key: value for key, value in model["STRIP_MLP"].items() if key != "FORM"}
    _check_bounds(chosen, source)
    config = from_dict(chosen, source)
    _check_timm_arguments(config.MODEL.TIMM_KWARGS, source)
    return config


def class_names(names, count: int) -> list[str]:
    """The names of a checkpoint's classes by label; if it has none, they are the labels.

    Raises:
        InputError: they are not ``count`` strings.
    """
    if names is None:
        return [str(label) for label in range(count)]
    if not isinstance(names, list) or not all(isinstance(name, str) and len(name) <= MAX_TEXT for name in names):
        raise InputError(f"its classes are {_short(names)}, not a list of names of up to {MAX_TEXT} characters")
    if len(names) != count:
        raise InputError(f"it has {len(names)} classes but MODEL.NUM_CLASSES is {count}")
    return names


def check_size(outline: nn.Module) -> None:
    """Raises InputError if a network, built on the meta device, is too large to be built from a checkpoint."""
    elements = sum(tensor.numel() for tensors in (outline.parameters(), outline.buffers()) for tensor in tensors)
    if elements > MAX_ELEMENTS:
        raise InputError(f"its config describes a network of {elements:,} parameters and buffers; a checkpoint may "
                         f"have up to {MAX_ELEMENTS:,}")


def _plain_key(key) -> str | int:
    if isinstance(key, str) and len(key) <= MAX_TEXT and key.isprintable():
        return key
    if type(key) is int and abs(key) < 2**64:
        return key
    raise InputError(f"it holds an entry named {_short(key)}")


def _check_tensor(tensor: torch.Tensor) -> None:
    is_dense = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
    if type(tensor) not in (torch.Tensor, nn.Parameter) or not is_dense or tensor.device.type != "cpu":
        raise InputError("it holds a tensor that is not dense and on the CPU (sparse, quantised, nested, meta)")
    if tensor.is_conj() or tensor.is_neg():
        raise InputError("it holds a tensor that is a conjugate or negative view of another one")


def _check_bounds(value, source: str, name: str = "") -> None:
    """Checks the bounds of every value of a config before the config is built from them."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_bounds(item, source, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        if len(value) > 16:
            raise InputError(f"{source}: {name} has {len(value)} entries; a checkpoint may set up to 16")
        for item in value:
            _check_bounds(item, source, name)
    elif type(value) in (int, float):
        limit = 256 if name.endswith(".DEPTHS") else _SIZES.get(name, 65536)
        if not abs(value) <= limit:  # which is false for nan
            raise InputError(f"{source}: {name} is {value}; a checkpoint may set numbers up to {limit}")
    elif isinstance(value, str):
        if len(value) > MAX_TEXT or not value.isprintable():
            raise InputError(f"{source}: {name} is {_short(value)}; a checkpoint may set up to {MAX_TEXT} printable "
                             "characters")
    elif not (value is None or type(value) is bool):
        raise InputError(f"{source}: {name} is {_short(value)}, which is not a config value")


def _check_timm_arguments(text: str, source: str) -> None:
    """A checkpoint's MODEL.TIMM_KWARGS may hold the sizes and choices of an architecture: numbers and plain words."""
    key = f"{source}: MODEL.TIMM_KWARGS"
    try:
        arguments = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"{key} is {_short(text)}, which does not name arguments")
    for name, value in arguments.items():
        if name not in _TIMM_ARGUMENTS:
            raise InputError(f"{key} sets {_short(name)}, which a checkpoint may not set")
        values = value if isinstance(value, list) else [value]
        for item in values:
            is_word = isinstance(item, str) and _WORD.fullmatch(item)
            is_number = isinstance(item, (bool, int, float)) and abs(item) <= _TIMM_ARGUMENTS[name]
            if not (is_word or is_number or item is None) or len(values) > 16:
                raise InputError(f"{key} sets {name} to {_short(value)}, which a checkpoint may not do")


def _short(value) -> str:
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
