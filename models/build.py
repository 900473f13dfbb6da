"""Builds the network that a config describes."""

import difflib

import timm
import yaml
from timm.layers import DropPath
from torch import nn

from .ablations import build_ablated
from .backbone import freeze_stages
from .strip_mlp import VARIANTS, StripMLPNet

WHOLE = ("both", True, True)  # the full network


def build_model(config) -> nn.Module:
    """The network that a config describes: a Strip-MLP, or any timm model to be trained with the same recipe.

    Raises:
        ValueError: sizes that do not fit together; an unknown timm model, or one that does not accept drop path or one
            of MODEL.TIMM_KWARGS, or lacks the gradient checkpointing that TRAIN.USE_CHECKPOINT requires.
    """
    if config.MODEL.TYPE == "timm":
        model = _build_timm_model(config)
    else:
        kwargs = _strip_mlp_arguments(config) | {
            "drop_path_rate": config.MODEL.DROP_PATH_RATE,
            "drop_path_schedule": config.MODEL.DROP_PATH_SCHEDULE,
        }
        choices = _ablations(config)
        model = StripMLPNet(**kwargs) if choices == WHOLE else build_ablated(*choices, **kwargs)
    if config.TRAIN.USE_CHECKPOINT:
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:  # a timm model's
            raise ValueError(f"MODEL.ARCH {config.MODEL.ARCH}: {error}; set TRAIN.USE_CHECKPOINT False") from None
    freeze_stages(model, config.TRAIN.FREEZE_STAGES)
    return model


def timm_arguments(config) -> tuple[str, dict]:
    """The name and arguments with which ``timm.create_model`` builds a config's network, without regularisation.

    Raises:
        ValueError: an ablated Strip-MLP, which timm cannot build.
    """
    if config.MODEL.TYPE == "timm":
        size = {"img_size": config.DATA.IMG_SIZE} if timm.get_pretrained_cfg(config.MODEL.ARCH).fixed_input_size else {}
        return config.MODEL.ARCH, {"num_classes": config.MODEL.NUM_CLASSES} | size | _timm_kwargs(config)
    if _ablations(config) != WHOLE:
        raise ValueError("an ablated Strip-MLP (MODEL.STRIP_MLP.TOKEN_MIXERS, CASCADE, SHORTCUTS) has no name in timm")
    kwargs = _strip_mlp_arguments(config)
    sizes = kwargs["embed_dim"], tuple(kwargs["depths"])
    alike = [name for name, variant in VARIANTS.items() if (variant["embed_dim"], variant["depths"]) == sizes]
    return (alike or list(VARIANTS))[0], kwargs


def _strip_mlp_arguments(config) -> dict:
    strip_mlp = config.MODEL.STRIP_MLP
    return {
        "img_size": strip_mlp.TRAINED_IMG_SIZE or config.DATA.IMG_SIZE,
        "dynamic_img_size": strip_mlp.TRAINED_IMG_SIZE > 0,
        "patch_size": strip_mlp.PATCH_SIZE,
        "in_chans": strip_mlp.IN_CHANS,
        "num_classes": config.MODEL.NUM_CLASSES,
        "embed_dim": strip_mlp.EMBED_DIM,
        "depths": strip_mlp.DEPTHS,
        "num_patches": strip_mlp.NUM_PATCHES,
        "strip_width": strip_mlp.STRIP_WIDTH,
        "mlp_ratio": strip_mlp.MLP_RATIO,
    }


def _ablations(config) -> tuple[str, bool, bool]:
    strip_mlp = config.MODEL.STRIP_MLP
    return strip_mlp.TOKEN_MIXERS, strip_mlp.CASCADE, strip_mlp.SHORTCUTS


def _build_timm_model(config) -> nn.Module:
    name = config.MODEL.ARCH
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ValueError(f"MODEL.ARCH {name!r} is not a timm model; similar ones: {', '.join(similar) or 'none'}")
    _, kwargs = timm_arguments(config)
    try:
        model = timm.create_model(name, **{"drop_path_rate": config.MODEL.DROP_PATH_RATE or None} | kwargs)
    except TypeError as error:
        raise ValueError(f"MODEL.ARCH {name}: {error}; if it has no drop path, set MODEL.DROP_PATH_RATE 0") from None
    if config.MODEL.DROP_PATH_RATE == 0:  # not passed to models without drop path; others have a default rate
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    return model


def _timm_kwargs(config) -> dict:
    """MODEL.TIMM_KWARGS as a dictionary."""
    text = config.MODEL.TIMM_KWARGS
    try:
        kwargs = yaml.safe_load(text) or {}
    except yaml.YAMLError:
        kwargs = None
    if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f"MODEL.TIMM_KWARGS is {text!r}; it must name arguments and values in YAML, e.g. "
                         "'{stem_type: deep, stem_width: 32}'")
    return kwargs
