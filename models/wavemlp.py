"""Wave-MLP (Tang et al., CVPR 2022, arXiv 2111.12294), a baseline of the paper's tables.

Modules have the names of the published checkpoints, so that these load unchanged. Notation as in ``strip_mlp.py``.
"""

from collections import OrderedDict
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from .backbone import Backbone, Stage

NORMS = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 1)}


class MLP(nn.Module):
    """Two 1x1 convolutions with a GELU between them: (N, C, H, W) -> (N, out_dim, H, W)"""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, out_dim, 1)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PATM(nn.Module):
    """Phase-aware token mixing: tokens are waves, their amplitudes and phases linear in the input.

    A wave's real and imaginary parts are mixed over the 7 tokens around it in its row, and likewise in its column.
    These two and a projection of the input are weighted per channel, with weights from their pooled sum.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.fc_h = nn.Conv2d(dim, dim, 1, bias=False)  # amplitudes
        self.fc_w = nn.Conv2d(dim, dim, 1, bias=False)
        self.fc_c = nn.Conv2d(dim, dim, 1, bias=False)
        self.tfc_h = nn.Conv2d(2 * dim, dim, (1, 7), padding=(0, 3), groups=dim, bias=False)
        self.tfc_w = nn.Conv2d(2 * dim, dim, (7, 1), padding=(3, 0), groups=dim, bias=False)
        self.reweight = MLP(dim, dim // 4, 3 * dim)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.theta_h_conv = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())  # phases
        self.theta_w_conv = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        row = self.tfc_h(wave(self.fc_h(x), self.theta_h_conv(x)))
        column = self.tfc_w(wave(self.fc_w(x), self.theta_w_conv(x)))
        channels = self.fc_c(x)
        scores = self.reweight((row + column + channels).mean((2, 3), keepdim=True))
        weights = scores.view(x.shape[0], -1, 3).softmax(dim=2)[:, :, :, None, None]  # (N, C, 3, 1, 1)
        return self.proj(row * weights[:, :, 0] + column * weights[:, :, 1] + channels * weights[:, :, 2])


def wave(amplitude, phase):
    """The real parts of all channels, then the imaginary parts: twice (N, C, H, W) -> (N, 2C, H, W)"""
    return torch.cat([amplitude * phase.cos(), amplitude * phase.sin()], dim=1)


class Block(nn.Module):
    """Token mixing, then channel mixing, each a residual branch with drop path."""

    def __init__(self, dim: int, mlp_ratio: float, norm, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn = PATM(dim)
        self.mlp = MLP(dim, int(mlp_ratio * dim), dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WaveMLP(Backbone):
    """Wave-MLP: four stages at 1/4, 1/8, 1/16 and 1/32 of the input size, which is free.

    Arguments as for ``SMLPNet``, and:

    Args:
        embed_dims, depths, mlp_ratios: channels, blocks and relative hidden width of each stage.
        norm: ``"group"``, a GroupNorm of one group, or ``"batch"``, a BatchNorm.
        embed_norm: whether a norm follows the stem and the convolutions between stages.
    """

    def __init__(
        self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
        embed_dims: tuple[int, int, int, int] = (64, 128, 320, 512), depths: tuple[int, int, int, int] = (2, 3, 10, 3),
        mlp_ratios: tuple[float, float, float, float] = (4, 4, 4, 4), norm: str = "group", embed_norm: bool = True,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"network.{2 * i}"} for i, dim in enumerate(embed_dims)
        ]
        make_norm, blocks = NORMS[norm], sum(depths)
        rates = iter([drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks)])

        def embedding(*conv):
            after = make_norm(conv[1]) if embed_norm else nn.Identity()
            return nn.Sequential(OrderedDict(proj=nn.Conv2d(*conv), norm=after))

        stages = [
            Stage(*(Block(dim, ratio, make_norm, next(rates)) for _ in range(depth)))
            for dim, depth, ratio in zip(embed_dims, depths, mlp_ratios, strict=True)
        ]
        self.patch_embed = embedding(in_chans, embed_dims[0], 7, 4, 2)
        self.network = nn.ModuleList(stages[:1])  # stages, and between them the convolutions that halve the sides
        for dims, stage in zip(pairwise(embed_dims), stages[1:], strict=True):
            self.network.extend([embedding(*dims, 3, 2, 1), stage])
        self.norm = make_norm(embed_dims[-1])
        self.head = nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    def _run_stages(self, x, count: int) -> list[torch.Tensor]:
        """The outputs of the first ``count`` stages: (N, dims[0], H/4, W/4) to (N, dims[3], H/32, W/32)."""
        outputs = []
        for embed, stage in zip([self.patch_embed, *self.network[1::2]], self.network[: 2 * count : 2], strict=False):
            x = stage(embed(x))
            outputs.append(x)
        return outputs

    def _keep_stages(self, count: int) -> None:
        """Removes the stages after the first ``count``."""
        self.network = self.network[: 2 * count - 1]

    def group_matcher(self, coarse: bool = False) -> dict:
        """As ``StripMLPNet``'s."""
        first = () if coarse else (0,)
        return {
            "stem": r"^patch_embed",
            "blocks": [
                *((rf"^network\.{i}\.", (i + 1, *first)) for i in range(1, len(self.network), 2)),
                (r"^network\.(\d+)" if coarse else r"^network\.(\d+)\.(\d+)", None),
                (r"^norm", (99999,)),  # timm: as the group before
            ],
        }


VARIANTS = {
    "wave_mlp_tiny": {"depths": (2, 2, 4, 2), "norm": "batch"},
    "wave_mlp_small": {"depths": (2, 3, 10, 3)},
    "wave_mlp_medium": {"depths": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4), "embed_norm": False},
    "wave_mlp_base": {"embed_dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "embed_norm": False},
}
