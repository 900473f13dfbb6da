"""The networks that the benchmarks name, ``[compiled:][published:]NAME``, and the published formulation of Strip-MLP.

The published formulation is the same network with the same weights, with what the authors' code computes otherwise, its
way: a strip layer is a grouped convolution over a permuted copy of its input, with the weight in its stored shape
(D*L, L, 1, K); a position map is gathered from its table with indices that the CPU computes again in each forward pass.
"""

import copy
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from config import load_config, nearest
from engine import OPTIONS
from inference import build_network
from models import StripMLPNet
from models.strip_mlp import GRN, LSMM, RelativePosition, StripMLP
from utils import InputError


class Named(NamedTuple):
    """A network in PyTorch's memory format (published) or channels last, its image size, whether to compile it."""

    network: nn.Module
    img_size: int
    is_compiled: bool = False
    is_published: bool = False


def build_named(name: str) -> Named:
    """The network of a name, for 1000 classes if it is a timm model's, with a drop-path rate of 0.1."""
    *prefixes, plain = name.split(":")
    if set(prefixes) - {"compiled", "published"}:
        raise InputError(f"{name}: the prefixes are compiled: and published:")
    if plain.endswith(".yaml"):
        config = load_config(plain)
        network, img_size = build_network(config), config.DATA.IMG_SIZE
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


def set_compile_options(words: list[str]) -> None:
    """Changes ``engine.OPTIONS`` by the KEY=VALUE words of ``--compile-options``."""
    try:
        OPTIONS.update((key, yaml.safe_load(value)) for key, _, value in (word.partition("=") for word in words))
        torch.compile(nn.Identity(), options=OPTIONS)  # checks their names and types
    except (RuntimeError, yaml.YAMLError) as error:
        reason = str(error).partition(", known options")[0]
        raise InputError(f"--compile-options {' '.join(words)}: {reason}") from None


def published_formulation(model: nn.Module) -> nn.Module:
    """A copy of a Strip-MLP network that computes the same function in the published way, at its trained size."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for kind, published in _PUBLISHED.items():
            if isinstance(module, kind):
                module.__class__ = published
    return model


class _GroupedConvolution(StripMLP):
    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        d, length, _, width = self.weight.shape
        n, c, h, w = x.shape
        x = x.view(n, c // d, d, h, w)
        # The tokens of a strip become channels: (N, P, D, H, W) -> (N, D, W, P, H), or (N, D, H, P, W) for columns.
        x = x.permute(0, 2, 4, 1, 3) if self.axis == "row" else x.permute(0, 2, 3, 1, 4)
        across = x.shape[-1]
        y = F.conv2d(
            x.reshape(n, d * length, c // d, across), self.weight.view(d * length, length, 1, width),
            self.bias.flatten(), padding=(0, width // 2), groups=d,
        ).view(n, d, length, c // d, across)
        y = y.permute(0, 3, 1, 4, 2) if self.axis == "row" else y.permute(0, 3, 1, 2, 4)
        return y.reshape(n, c, h, w)


class _GatheredPosition(RelativePosition):
    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        height, width = x.shape[2:]
        offsets = torch.arange(width)[None, :] - torch.arange(height)[:, None] + height
        return x + self.table[offsets.to(self.table.device)].permute(2, 0, 1)


class _SummedBranches(LSMM):
    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        row, column = self.row_conv(x), self.column_conv(x)
        pooled = (row + column + x).mean((2, 3), keepdim=True)
        scores = self.reweight_fc2(F.gelu(self.reweight_fc1(pooled)))
        weights = scores.view(len(x), -1, 3).softmax(dim=2)[:, :, :, None, None]  # (N, C, 3, 1, 1)
        return column * weights[:, :, 0] + row * weights[:, :, 1] + x * weights[:, :, 2]


class _PlainGRN(GRN):
    def forward(self, x):
        """(N, H, W, C) -> (N, H, W, C)"""
        g = x.norm(dim=(1, 2), keepdim=True)
        return self.gamma * (x * (g / (g.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


_PUBLISHED = {
    StripMLP: _GroupedConvolution, RelativePosition: _GatheredPosition, LSMM: _SummedBranches, GRN: _PlainGRN,
}
