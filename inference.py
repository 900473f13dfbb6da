"""From a checkpoint alone to a network that is ready to use.

    net, config, classes = load_network("output/.../best.pth")

The checkpoint need not be trusted. Its config determines the network and the preparation of its images. It cannot name
a file, an address or weights, and the bounds below limit every loop and allocation that depends on it.
"""

import logging
import re
from pathlib import Path

import huggingface_hub
import torch
from torch import nn
from yacs.config import CfgNode

from checkpoint import MAX_TEXT, load_file, short
from config import flat_keys, from_dict, parse_yaml
from models import adapt_size, average_state_dict, build_model, check_fit, model_state_dict
from utils import InputError, input_errors, printable

logger = logging.getLogger("strip_mlp")

WEIGHTS = "model.safetensors"  # the name that timm looks for, in a folder and on the Hub
PREFIX = "hf-hub:"
MAX_ELEMENTS = 2_000_000_000  # of a network's parameters and buffers

_SIZES = {  # of other numbers: 65,536
    "DATA.IMG_SIZE": 4096, "MODEL.STRIP_MLP.TRAINED_IMG_SIZE": 4096, "MODEL.NUM_CLASSES": 10**6,
}
_CHOSEN_BY_CHECKPOINTS = {"DATA": ("DATASET", "IMG_SIZE", "INTERPOLATION"), "TEST": ("CROP",)}
_CHOSEN_BY_USERS = ("PRETRAINED", "RESUME")  # of MODEL; its other keys are the architecture
_NETWORK_KEYS = ("TYPE", "ARCH", "TIMM_KWARGS", "STRIP_MLP.")  # of MODEL, those that weights depend on
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


def weights_file(source: str | Path) -> Path:
    """The file of a trained network. Every name of a network that a user gives goes through here; nothing else
    downloads.

    Args:
        source: a checkpoint file, which need not exist; a run's folder, for its ``best.pth``; a folder with
            ``model.safetensors``; or ``hf-hub:USER/NAME``, optionally with ``@REVISION``, for a repository on Hugging
            Face's Hub, which is downloaded once.
    """
    name = str(source)
    if name.startswith(PREFIX):
        repository, _, revision = name.removeprefix(PREFIX).partition("@")
        try:
            return Path(huggingface_hub.hf_hub_download(repository, WEIGHTS, revision=revision or None))
        except Exception as error:  # many causes: the name, the network, access, the disk
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise InputError(f"{name} cannot be downloaded ({reason[0]}); check the name and the network") from error
    path = Path(source)
    if not path.is_dir():
        return path
    for name in (WEIGHTS, "best.pth"):
        if (path / name).is_file():
            logger.warning("%s is a folder; using its %s", path, name)
            return path / name
    raise InputError(f"{path} is a folder without {WEIGHTS} or best.pth; name a checkpoint file")


def load_network(
    source: str | Path, config: CfgNode | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, CfgNode, list[str]]:
    """Builds the network of a checkpoint with its weights, or with their average where that was better.

    Args:
        source: a checkpoint file of this project or a released one, or anything else that ``weights_file`` takes.
        config: see ``read_network``; with another image size than the checkpoint's, the weights are resized.
        device: the network's device.

    Returns:
        The network in evaluation mode, its config, and the names of its classes by label; if the checkpoint has no
        names, they are the labels.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as ``read_network`` and ``build_with_weights``, or there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here; use the device cpu")
    path = weights_file(source)
    content, network_config, classes = read_network(path, config)
    weights = content["model_ema" if predicts_by_average(content) else "model"]
    model = build_with_weights(path, weights, network_config, may_resize=config is not None)
    return model.to(device).eval(), network_config, classes


def predicts_by_average(content: dict) -> bool:
    """Whether a checkpoint predicts with the average of its weights: if it has one, unless the last evaluation found it
    worse than the weights themselves."""
    return content.get("model_ema") is not None and content.get("is_average_best") is not False


def read_network(path: Path, config: CfgNode | None = None) -> tuple[dict, CfgNode, list[str]]:
    """What a checkpoint says about its network: its entries, with the weights as ``model`` and, if there is one, their
    average as ``model_ema``; the config of the network; the names of its classes.

    The checkpoint's own config says which network it holds. Only for one without it, such as a released one, ``config``
    does. Everything that is not part of the network comes from ``config``: image size, data, settings of the run.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not a checkpoint, its config is not that of a network, or it has none and none is given.
    """
    content = load_file(path)
    with input_errors(path):
        content |= {"model": model_state_dict(content), "model_ema": average_state_dict(content)}
        config = _network_config(content.get("config"), config, path)
        return content, config, class_names(content.get("classes"), config.MODEL.NUM_CLASSES)


def build_with_weights(
    path: Path, weights: dict[str, torch.Tensor], config: CfgNode, may_resize: bool = True, warn: bool = True
) -> nn.Module:
    """The network of a config with weights from a file.

    It is first built on the meta device, where it takes no memory: a small file cannot request a huge network. An
    InputError says that the weights do not fit the config or are not finite, or that the network is too large.

    Args:
        path: the file.
        weights: its weights, under this project's keys.
        config: the network's.
        may_resize: resize the weights if the config has another image size, with a warning if ``warn``.
    """
    try:
        try:
            with torch.device("meta"):
                outline = build_model(config)
        except ValueError:
            raise
        except Exception as error:  # wrong sizes can fail anywhere in a timm model
            raise InputError(f"its network cannot be built ({type(error).__name__}: {error})") from error
        check_size(outline)
        weights = adapt_size(weights, outline, warn) if may_resize else weights
        check_fit(outline, weights)
        model = build_model(config)
        model.load_state_dict(weights)
        return model
    except ValueError as error:
        lines = [printable(line)[:300] for line in str(error).splitlines()]
        if len(lines) > 10:
            lines[10:] = [f"  ... and {len(lines) - 10} more"]
        raise InputError(f"{path}: " + "\n".join(lines)) from error


def _network_config(saved, given: CfgNode | None, path: Path) -> CfgNode:
    """The config ``given``, or the defaults, with the network of a checkpoint's config where it has one."""
    try:
        if not isinstance(saved, dict):
            raise InputError("it holds no config")
        own = architecture(saved, "its config")
    except InputError as error:
        if given is None:
            raise InputError(f"{error}; use --cfg to name the config that it was trained with") from error
        return given
    if given is None:
        return own
    config, before, now = given.clone(), flat_keys(given.MODEL), flat_keys(own.MODEL)
    differing = [key for key in now if key.startswith(_NETWORK_KEYS) and before[key] != now[key]
                 and key != "STRIP_MLP.TRAINED_IMG_SIZE"]  # the images' size decides it
    if differing:
        logger.warning("%s holds another network than --cfg describes, and its own is used: %s", path, ", ".join(
            f"MODEL.{key} {short(now[key])} instead of {short(before[key])}" for key in differing))
    config.defrost()
    own = own.clone()
    own.defrost()
    config.MODEL.update({key: value for key, value in own.MODEL.items() if key not in (*_CHOSEN_BY_USERS, "NAME")})
    if config.DATA.IMG_SIZE != own.DATA.IMG_SIZE:
        config.MODEL.STRIP_MLP.TRAINED_IMG_SIZE = given.MODEL.STRIP_MLP.TRAINED_IMG_SIZE
    config.freeze()
    return config


def build_network(config: CfgNode) -> nn.Module:
    """``models.build_model`` for a config that a user wrote; a network that cannot be built is an InputError."""
    with input_errors():
        return build_model(config)


def image_shape(config) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network takes."""
    return config.MODEL.STRIP_MLP.IN_CHANS, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE


def check_classes(saved, found: list[str]) -> None:
    """Raises InputError if the data set's classes have other names than those that the network was trained on."""
    labels = class_names(None, len(found))
    saved = class_names(saved, len(found))
    if saved not in (labels, list(found)) and list(found) != labels:
        label = next(i for i, (one, other) in enumerate(zip(saved, found, strict=True)) if one != other)
        raise InputError(
            f"its classes differ from the data set's: label {label} is {saved[label]!r} in the checkpoint "
            f"and {found[label]!r} in the data set; check --data-path, or rename the class folders"
        )


# ---- what a checkpoint's config may say ------------------------------------------------------------

def architecture(values: dict, source: str):
    """The config with the architecture of a checkpoint's config and defaults for everything else.

    An InputError names ``source`` and an unknown key, a value out of range or one that a checkpoint may not set.
    """
    model = values.get("MODEL")
    if not isinstance(model, dict) or "STRIP_MLP" not in model:  # as in every config that this project saves
        raise InputError(f"{source} does not describe a network: it has no group MODEL.STRIP_MLP")
    chosen = {"MODEL": {key: value for key, value in model.items() if key not in _CHOSEN_BY_USERS}}
    for group, keys in _CHOSEN_BY_CHECKPOINTS.items():
        found = values.get(group, {})
        if not isinstance(found, dict):
            raise InputError(f"{source}: {group} is {short(found)}, not a group of keys")
        chosen[group] = {key: found[key] for key in keys if key in found}
    _check_bounds(chosen, source)
    config = from_dict(chosen, source)
    _check_timm_arguments(config.MODEL.TIMM_KWARGS, source)
    return config


def class_names(names, count: int) -> list[str]:
    """The names of a checkpoint's ``count`` classes by label; if it has none, they are the labels."""
    if names is None:
        return [str(label) for label in range(count)]
    if not isinstance(names, list) or not all(isinstance(name, str) and len(name) <= MAX_TEXT for name in names):
        raise InputError(f"its classes are {short(names)}, not a list of names of up to {MAX_TEXT} characters")
    if len(names) != count:
        raise InputError(f"it has {len(names)} classes but MODEL.NUM_CLASSES is {count}")
    return names


def check_size(outline: nn.Module) -> None:
    """Raises InputError if a network, built on the meta device, is too large to be built from a checkpoint."""
    elements = sum(tensor.numel() for tensors in (outline.parameters(), outline.buffers()) for tensor in tensors)
    if elements > MAX_ELEMENTS:
        raise InputError(f"its config describes a network of {elements:,} parameters and buffers; a checkpoint may "
                         f"have up to {MAX_ELEMENTS:,}")


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
            raise InputError(f"{source}: {name} is {short(value)}; a checkpoint may set up to {MAX_TEXT} printable "
                             "characters")
    elif not (value is None or type(value) is bool):
        raise InputError(f"{source}: {name} is {short(value)}, which is not a config value")


def _check_timm_arguments(text: str, source: str) -> None:
    """A checkpoint's MODEL.TIMM_KWARGS may hold the sizes and choices of an architecture: numbers and plain words."""
    key = f"{source}: MODEL.TIMM_KWARGS"
    arguments = parse_yaml(text, key) or {}
    if not isinstance(arguments, dict):
        raise InputError(f"{key} is {short(text)}, which does not name arguments")
    for name, value in arguments.items():
        if name not in _TIMM_ARGUMENTS:
            raise InputError(f"{key} sets {short(name)}, which a checkpoint may not set")
        values = value if isinstance(value, list) else [value]
        for item in values:
            is_word = isinstance(item, str) and _WORD.fullmatch(item)
            is_number = isinstance(item, (bool, int, float)) and abs(item) <= _TIMM_ARGUMENTS[name]
            if not (is_word or is_number or item is None) or len(values) > 16:
                raise InputError(f"{key} sets {name} to {short(value)}, which a checkpoint may not do")
