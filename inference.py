"""From a checkpoint alone to a network that is ready to use.

    net, config, classes = load_network("output/.../best.pth")
"""

from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from checkpoint import load_file
from hub import weights_file
from models import InputError, adapt_size, build_model, check_fit, load_strict, model_state_dict
from safe_text import printable
from trust import architecture, check_size, class_names


def load_network(
    checkpoint: str | Path, config: CfgNode | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, CfgNode, list[str]]:
    """Builds the network of a checkpoint with its weights, or with their average if it has one.

    The checkpoint need not be trusted. Its config determines only the network and the preparation of images; everything
    else in the returned config has its default.

    Args:
        checkpoint: a file of this project or a released one, or anything else that ``hub.weights_file`` takes.
        config: for a checkpoint without a config, such as a released one, or for another input size, to which the
            weights are then resized; by default the checkpoint's own.
        device: the network's device.

    Returns:
        The network in evaluation mode, its config, and the names of its classes by label; if the checkpoint has no
        names, they are the labels.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not a checkpoint, has no config and none is given, its weights do not fit the config or are
            not finite, its config is not that of a network of bounded size, or there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch finds no GPU here; use the device cpu")
    checkpoint = weights_file(checkpoint)
    content = load_file(checkpoint)
    try:
        has_average = content.get("model_ema") is not None
        state_dict = model_state_dict({"model": content["model_ema"]} if has_average else content)
        is_own, config = config is None, config or _own_config(content)
        classes = class_names(content.get("classes"), config.MODEL.NUM_CLASSES)
        outline = _outline(config)
        if not is_own:  # its own must fit unchanged, so that a small file cannot request a huge network
            state_dict = adapt_size(state_dict, outline)
        check_fit(outline, state_dict)
        model = build_model(config)
        load_strict(model, state_dict)
    except InputError as error:
        lines = [printable(line)[:300] for line in str(error).splitlines()]
        if len(lines) > 10:
            lines[10:] = [f"  ... and {len(lines) - 10} more"]
        raise InputError(f"{checkpoint}: " + "\n".join(lines)) from error
    return model.to(device).eval(), config, classes


def _own_config(content: dict) -> CfgNode:
    if not isinstance(content.get("config"), dict):
        raise InputError("it holds no config; use --cfg to name the one that it was trained with")
    try:
        return architecture(content["config"], "its config")
    except InputError as error:
        raise InputError(f"{error}; use --cfg to name the config that it was trained with") from error


def _outline(config: CfgNode) -> nn.Module:
    """The network on the meta device, where it takes no memory, so that a network that does not fit is never built."""
    try:
        with torch.device("meta"):
            outline = build_model(config)
    except InputError:
        raise
    except Exception as error:  # wrong sizes can fail anywhere in a timm model
        raise InputError(f"its network cannot be built ({type(error).__name__}: {error})") from error
    check_size(outline)
    return outline


def image_shape(config) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network takes."""
    return config.MODEL.STRIP_MLP.IN_CHANS, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE
