"""From a checkpoint alone to a network that is ready to use.

    net, config, classes = load_network("output/.../best.pth")
"""

from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from checkpoint import load_file
from config import from_dict
from models import adapt_size, build_model, load_strict, model_state_dict


def load_network(
    checkpoint: str | Path, config: CfgNode | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, CfgNode, list[str]]:
    """Builds the network that a checkpoint holds, with its weights, or with their average where it has one.

    Args:
        checkpoint: a file of this project or a released one.
        config: describes the network where the checkpoint does not, as a released one, or for another input size, to
            which the weights are then adapted; else the checkpoint's own is taken.
        device: where the network goes.

    Returns:
        The network in evaluation mode, its config, and the names of its classes by label, which are the labels
        themselves where the checkpoint holds no names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, holds no config while none is given, its weights do not fit the config, or
            there is no such device.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no GPU here; choose the device cpu")
    content = load_file(checkpoint)
    try:
        state_dict = model_state_dict({"model": content["model_ema"]} if content.get("model_ema") else content)
        config = config or _own_config(content)
        classes = content.get("classes") or [str(label) for label in range(config.MODEL.NUM_CLASSES)]
        if len(classes) != config.MODEL.NUM_CLASSES:
            raise ValueError(f"it has {len(classes)} classes but MODEL.NUM_CLASSES is {config.MODEL.NUM_CLASSES}")
        model = build_model(config)
        load_strict(model, adapt_size(state_dict, model))
    except ValueError as error:
        lines = str(error).splitlines()
        if len(lines) > 10:
            lines[10:] = [f"  ... and {len(lines) - 10} more"]
        raise ValueError(f"{checkpoint}: " + "\n".join(lines)) from error
    return model.to(device).eval(), config, classes


def _own_config(content: dict) -> CfgNode:
    if not isinstance(content.get("config"), dict):
        raise ValueError("it holds no config; name the one that it was trained with by --cfg")
    try:
        return from_dict(content["config"], "its config")
    except ValueError as error:
        raise ValueError(f"{error}; name the config that it was trained with by --cfg") from error


def image_shape(config) -> tuple[int, int, int]:
    """Channels, height and width of the images that the network takes."""
    return config.MODEL.STRIP_MLP.IN_CHANS, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE
