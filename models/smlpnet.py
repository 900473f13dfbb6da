"""sMLPNet (SPACH, Tang et al., arXiv 2109.05422), a baseline of the paper's tables.

Modules have the names of the published checkpoints, so that these load unchanged. Notation as in ``strip_mlp.py``.
"""

from collections import OrderedDict
from itertools import accumulate

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

from .backbone import Backbone, check_images, check_img_size, map_sizes, run_block

torch.fx.wrap("check_images")  # it branches on the input's size


class SparseMLP(nn.Module):
    """Mixes each token with its row and with its column, in parallel, and fuses both with the token itself.

    Args:
        dim: C, the channels of the input.
        size: (H, W) of the feature map.
    """

    def __init__(self, dim: int, size: tuple[int, int]):
        super().__init__()
        height, width = size
        self.BN = nn.BatchNorm2d(dim)
        self.proj_h = nn.Conv2d(width, width, 1)
        self.proh_w = nn.Conv2d(height, height, 1)
        self.fuse = nn.Conv2d(3 * dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = F.gelu(self.BN(x))
        row = self.proj_h(x.transpose(1, 3)).transpose(1, 3)  # a convolution over (N, W, H, C), W its channels
        column = self.proh_w(x.transpose(1, 2)).transpose(1, 2)
        return self.fuse(torch.cat([x, row, column], dim=1))


class Permute(nn.Module):
    """A tensor with its axes in another order."""

    def __init__(self, *axes: int):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


class Residual(nn.Sequential):
    """Adds the output of its modules to their input."""

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        return x + super().forward(x)


def token_mixing(dim: int, size: tuple[int, int], drop_path: float) -> Residual:
    """BN, GELU, a 3x3 depthwise convolution, then a ``SparseMLP``."""
    conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
    merge = nn.Sequential(OrderedDict(BN=nn.BatchNorm2d(dim), act=nn.GELU(), Conv=conv))
    return Residual(nn.Sequential(OrderedDict(conv_merge=merge)), SparseMLP(dim, size), DropPath(drop_path))


def channel_mixing(dim: int, hidden_dim: int, drop_path: float) -> Residual:
    """LayerNorm, then an MLP over the channels of each token."""
    net = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Identity(), nn.Linear(hidden_dim, dim))
    mlp = nn.Sequential(OrderedDict(net=net))
    return Residual(Permute(0, 2, 3, 1), nn.LayerNorm(dim), mlp, Permute(0, 3, 1, 2), DropPath(drop_path))


class SMLPNet(Backbone):
    """sMLPNet: four stages at 1/4, 1/8, 1/16 and 1/32 of the input size. It is built for one input size.

    Arguments as for ``StripMLPNet``, with a patch size of 4 and a drop path that rises linearly from 0 in the first
    block to ``drop_path_rate`` in the last.
    """

    classifier, final_norm = "mlp_head.0", "batch_norm"

    def __init__(
        self, img_size: int | tuple[int, int] = 224, in_chans: int = 3, num_classes: int = 1000,
        global_pool: str = "avg", embed_dim: int = 80, depths: tuple[int, int, int, int] = (2, 8, 14, 2),
        mlp_ratio: float = 3.0, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ):
        dims = [embed_dim * 2**stage for stage in range(4)]
        super().__init__()
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"stage {stage}"} for stage, dim in enumerate(dims)
        ]
        self.img_size = check_img_size(img_size, patch_size=4)
        ends = list(accumulate(depths))
        self.blocks = [range(end - depth, end) for end, depth in zip(ends, depths, strict=True)]  # numbers, by stage
        self.to_patch_embedding = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, dim, stride, stride, bias=False))
            for before, dim, stride in zip([in_chans, *dims], dims, [4, 2, 2, 2], strict=False)
        )
        self.token_mix, self.channel_mix = nn.ModuleList(), nn.ModuleList()
        for dim, depth, size in zip(dims, depths, map_sizes(self.img_size, patch_size=4), strict=True):
            for _ in range(depth):
                rate = drop_path_rate * len(self.token_mix) / max(sum(depths) - 1, 1)
                self.token_mix.append(token_mixing(dim, size, rate))
                self.channel_mix.append(channel_mixing(dim, int(mlp_ratio * dim), rate))
        self.batch_norm = nn.BatchNorm2d(dims[-1])
        self.mlp_head = nn.Sequential(nn.Identity())
        self.reset_classifier(num_classes, global_pool)

    def _run_stages(self, x, count: int) -> list[torch.Tensor]:
        """The outputs of the first ``count`` stages: (N, C, H/4, W/4) to (N, 8C, H/32, W/32)."""
        x = check_images(x, self.img_size, 32)
        outputs = []
        for embedding, blocks in zip(self.to_patch_embedding[:count], self.blocks, strict=False):
            x = embedding(x)
            for i in blocks:
                for block in (self.token_mix[i], self.channel_mix[i]):
                    x = run_block(block, x, self.grad_checkpointing)
            outputs.append(x)
        return outputs

    def _keep_stages(self, count: int) -> None:
        """Removes the stages after the first ``count``."""
        end = self.blocks[count - 1].stop
        self.to_patch_embedding = self.to_patch_embedding[:count]
        self.token_mix, self.channel_mix = self.token_mix[:end], self.channel_mix[:end]

    def group_matcher(self, coarse: bool = False) -> dict:
        """As ``StripMLPNet``'s."""
        blocks = r"^(?:token_mix|channel_mix)\."
        if coarse:
            found = [(rf"{blocks}(?:{'|'.join(map(str, numbers))})\.", (i,)) for i, numbers in enumerate(self.blocks)]
        else:
            found = [(rf"{blocks}(\d+)", None)]
        for stage, numbers in enumerate(self.blocks):
            found.append((rf"^to_patch_embedding\.{stage}\.", (stage if coarse else numbers.start,)))
        found.append((r"^batch_norm", (99999,)))  # timm: as the group before
        return {"stem": r"^to_patch_embedding\.0\.", "blocks": found}


VARIANTS = {
    "smlpnet_tiny": {"embed_dim": 80, "depths": (2, 8, 14, 2)},
    "smlpnet_small": {"embed_dim": 96, "depths": (2, 10, 24, 2), "drop_path_rate": 0.2},
    "smlpnet_base": {"embed_dim": 112, "depths": (2, 10, 24, 2), "drop_path_rate": 0.3},
}
