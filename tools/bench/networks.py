"""The networks that the benchmarks name: ``[compiled:][published:]NAME``, NAME of timm's or a config file."""

from typing import NamedTuple

import timm
from torch import nn

import inference
from config import load_config, nearest
from models import StripMLPNet
from tools.bench.published import published_formulation
from utils import InputError


class Named(NamedTuple):
    """A network in PyTorch's memory format (published) or channels last, its image size, whether to compile it."""

    network: nn.Module
    img_size: int
    is_compiled: bool
    is_published: bool


def build_named(name: str) -> Named:
    """The network of a name, for 1000 classes if it is a timm model's, with a drop-path rate of 0.1.

    Raises:
        InputError: there is no such network, or no published formulation of it.
    """
    *prefixes, plain = name.split(":")
    if set(prefixes) - {"compiled", "published"}:
        raise InputError(f"{name}: the prefixes are compiled: and published:")
    if plain.endswith(".yaml"):
        config = load_config(plain)
        network, img_size = inference.build_network(config), config.DATA.IMG_SIZE
    elif timm.is_model(plain):
        network = timm.create_model(plain, drop_path_rate=0.1)
        img_size = network.pretrained_cfg["input_size"][-1]
    else:
        raise InputError(f"{plain} is neither a timm model nor a config file{nearest(plain, timm.list_models())}")
    if "published" in prefixes:
        if not isinstance(network, StripMLPNet):
            raise InputError(f"{name}: {plain} is not a Strip-MLP, so it has no published formulation")
        network = published_formulation(network)
    return Named(network, img_size, "compiled" in prefixes, "published" in prefixes)
