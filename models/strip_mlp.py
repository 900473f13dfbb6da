"""Strip-MLP (Cao et al., ICCV 2023, arXiv 2307.11458), to be read beside the paper.

Notation: batch N, channels C, height H, width W; every feature map is (N, C, H, W). P is the number of channel patches,
D = C / P the channels of a patch, L the length of a strip: W for a row, H for a column.

What you change here trains, on every device: no layer has a second implementation elsewhere.
"""

import math
from collections.abc import Callable

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import nn

from .backbone import Stage, StripBackbone, check_images, check_img_size, map_sizes
from .windows import cut, merge

for _name in ("channel_norm", "check_images", "cut", "merge"):
    torch.fx.wrap(_name)  # it branches on the input's size or type, which torch.fx does not know


class StripMLP(nn.Module):
    """Strip MLP layer (section 3): a linear layer over each token's strip of rows or columns.

    With channel ``c = p * D + d`` (patch p, channel d of the patch), K rows in a strip and zeros outside the map,
    ``axis="row"`` computes
    ``y[n, c, h, j] = bias[d, j] + sum over k, i of weight[d, j, i, k] * x[n, c, h + k - K//2, i]``
    and ``axis="column"`` the same on the transposed map. The P patches share the weights, and so do all rows (columns).

    Args:
        dim, length, num_patches, strip_width: C, L, P and K.
        axis: ``"row"`` or ``"column"``.
    """

    def __init__(self, dim: int, length: int, num_patches: int, axis: str, strip_width: int = 3):
        super().__init__()
        self.axis, self.strip_width = axis, strip_width
        self.weight = nn.Parameter(torch.empty(dim // num_patches, length, length, strip_width))  # (D, out, in, K)
        self.bias = nn.Parameter(torch.empty(dim // num_patches, length))
        bound = 1 / math.sqrt(length * strip_width)  # PyTorch's default for a convolution of this fan-in
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        d, k = self.weight.shape[0], self.strip_width
        x = x.unflatten(1, (-1, d)).movedim(2, 0)  # (N, C, H, W) -> (D, N, P, H, W)
        x = x if self.axis == "row" else x.transpose(3, 4)  # (D, N, P, across, L)
        p, across = x.shape[2:4]
        x = F.pad(x, (0, 0, k // 2, k // 2))
        strips = torch.cat([x.narrow(3, i, across) for i in range(k)], dim=-1)  # (D, N, P, across, K * L)
        matrices = self.weight.permute(0, 3, 2, 1).flatten(1, 2)  # (D, K * L, L)
        y = torch.baddbmm(self.bias[:, None], strips.flatten(1, 3), matrices).unflatten(1, (-1, p, across))
        y = y if self.axis == "row" else y.transpose(3, 4)  # (D, N, P, H, W)
        return y.permute(1, 3, 4, 2, 0).flatten(3).permute(0, 3, 1, 2)  # in channels-last memory


class RelativePosition(nn.Module):
    """Relative position map: ``x[n, c, i, j] + table[j - i + H, c]``.

    Args:
        dim: C, the channels of the input.
        size: (H, W) of the feature map, or its side if it is square. The table has ``H + W + 1`` entries (``2 * L + 1``
            in the released network, whose maps are square); the first and the last are never read.
    """

    def __init__(self, dim: int, size: int | tuple[int, int]):
        super().__init__()
        self.size = to_2tuple(size)
        self.table = nn.Parameter(torch.empty(sum(self.size) + 1, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def map(self):
        """() -> (C, H, W)"""
        height, width = self.size
        # Row i of the map is table[H - i:][:W]. H copies of the table, without the first H entries, are cut into rows
        # one entry shorter than it, so that row i starts at entry H - i. An index would need a scatter backward.
        rows = self.table.repeat(height, 1)[height:].unflatten(0, (height, -1))  # (H, H + W, C)
        return rows[:, :width].permute(2, 0, 1)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        return x + self.map().to(x.dtype)  # otherwise the sum under autocast would have 32 bits


class CGSMM(nn.Module):
    """Cascade Group Strip Mixing Module (section 3): a row strip layer, then a column strip layer on its result.

    Args:
        dim, num_patches, strip_width: C, P and K.
        size: (H, W) of the feature map, or its side if it is square.
    """

    def __init__(self, dim: int, size: int | tuple[int, int], num_patches: int, strip_width: int = 3):
        super().__init__()
        self.size = height, width = to_2tuple(size)
        self.row_position = RelativePosition(dim, size)
        self.row_strip = StripMLP(dim, width, num_patches, "row", strip_width)
        self.row_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.column_position = RelativePosition(dim, size)
        self.column_strip = StripMLP(dim, height, num_patches, "column", strip_width)
        self.column_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        windows = cut(x, self.size)  # x itself if it has this size
        row = self.row_strip(self.row_position(windows))
        y = F.gelu(self.norm(self.row_fuse(torch.cat([row, windows], dim=1))))
        column = merge(self.column_strip(self.column_position(y)), x.shape)
        return self.column_fuse(torch.cat([x, column], dim=1))


class LSMM(nn.Module):
    """Local Strip Mixing Module (section 3): two depthwise strip convolutions and the input, weighted per channel.

    The weights come from the pooled sum of the three branches. The paper's figure puts the MLP before the pooling; the
    released network pools first, and so does this one.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.row_conv = nn.Conv2d(dim, dim, (3, 7), padding=(1, 3), groups=dim, bias=False)
        self.column_conv = nn.Conv2d(dim, dim, (7, 3), padding=(3, 1), groups=dim, bias=False)
        self.reweight_fc1 = nn.Conv2d(dim, dim // 2, 1)
        self.reweight_fc2 = nn.Conv2d(dim // 2, 3 * dim, 1)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        column, row = self.column_conv(x), self.row_conv(x)
        pooled = sum(branch.mean((2, 3), keepdim=True) for branch in (column, row, x))  # (N, C, 1, 1)
        scores = self.reweight_fc2(F.gelu(self.reweight_fc1(pooled)))
        w = scores.view(x.shape[0], -1, 3).softmax(dim=2).to(row.dtype)[:, :, :, None, None]  # (N, C, 3, 1, 1)
        # column * w[0] + row * w[1] + x * w[2]
        return torch.addcmul(torch.addcmul(column * w[:, :, 0], row, w[:, :, 1]), x, w[:, :, 2])


class StripMixingBlock(nn.Module):
    """Token mixing (figure 2b): CGSMM on the first half of the channels, LSMM on the second."""

    def __init__(self, dim: int, size: int | tuple[int, int], num_patches: int, strip_width: int = 3):
        super().__init__()
        self.conv_norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.cgsmm = CGSMM(dim // 2, size, num_patches, strip_width)
        self.lsmm = LSMM(dim // 2)
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.conv(F.gelu(self.conv_norm(x)))
        first, second = F.gelu(self.proj_norm(self.proj_in(x))).chunk(2, dim=1)
        return self.proj_out(torch.cat([self.cgsmm(first), self.lsmm(second)], dim=1))


class GRN(nn.Module):
    """Global response normalisation (ConvNeXt V2), channels last.

    ``gamma`` and ``beta`` have four dimensions, as in the released checkpoints, so that weight decay reaches them.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        """(N, H, W, C) -> (N, H, W, C)"""
        g = channel_norm(x)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        scale = (1 + self.gamma * n).to(x.dtype)
        return torch.addcmul(self.beta.to(x.dtype), x, scale)  # gamma * (x * n) + beta + x


def channel_norm(x):
    """The L2 norm over H and W, in at least 32 bits: (N, H, W, C) -> (N, 1, 1, C)"""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    # Several times faster than vector_norm on a CPU. The clamp keeps the gradient of the root finite at 0.
    return x.square().sum((1, 2), keepdim=True).clamp(min=1e-24).sqrt()


class ChannelMixingBlock(nn.Module):
    """Channel mixing (figure 2c): a 7x7 depthwise convolution, then an MLP of width ``mlp_ratio * dim`` with GRN."""

    def __init__(self, dim: int, mlp_ratio: float = 3.0):
        super().__init__()
        hidden_dim = int(mlp_ratio * dim)
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.grn = GRN(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.conv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.fc2(self.grn(F.gelu(self.fc1(self.norm(x)))))
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class DropPathAdd(DropPath):
    """``x + drop_path(branch)`` in one pass over the feature maps."""

    def forward(self, x, branch):
        """(N, C, H, W), (N, C, H, W) -> (N, C, H, W)"""
        if not self.training or self.drop_prob == 0:
            return x + branch
        kept = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop_prob)
        return torch.addcmul(x, branch, kept.div_(1 - self.drop_prob))


class Block(nn.Module):
    """Token mixing, then channel mixing, each a residual branch with drop path."""

    def __init__(
        self, dim: int, size: int | tuple[int, int], num_patches: int, strip_width: int, mlp_ratio: float,
        drop_path: float, token_mixing=StripMixingBlock,
    ):
        super().__init__()
        self.token_mixing = token_mixing(dim, size, num_patches, strip_width)
        self.channel_mixing = ChannelMixingBlock(dim, mlp_ratio)
        self.drop_path = DropPathAdd(drop_path)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.drop_path(x, self.token_mixing(x))
        return self.drop_path(x, self.channel_mixing(x))


class StripMLPNet(StripBackbone):
    """Strip-MLP (figure 2a): four stages at 1/4, 1/8, 1/16 and 1/32 of the input size for ``patch_size`` 4.

    The strip weights depend on the size of the feature maps, so a network is built for one input size. With
    ``dynamic_img_size`` it takes images of any size; ``set_input_size`` adapts its weights to another size.

    Args:
        img_size: side of the square input in pixels, or its (height, width), multiples of ``8 * patch_size``.
        dynamic_img_size: take images of any size of at least ``8 * patch_size`` pixels a side, see ``windows.py``.
        patch_size: kernel and stride of the stem.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0: no head.
        global_pool: ``"avg"``, the mean over all tokens, or ``""``, no pooling, for a network without a head.
        embed_dim: C, the channels of the first stage; they double at every stage.
        depths: blocks of the four stages.
        num_patches: P, the channel patches that share strip weights; divides ``embed_dim / 2``.
        strip_width: K, the rows (columns) of a strip, odd.
        mlp_ratio: alpha, the hidden width of the channel mixing, relative to its input.
        drop_rate: dropout before the head, while training.
        drop_path_rate: probability of dropping a residual branch for an image, while training.
        drop_path_schedule: ``"constant"``, the rate in every block, as in the released network; ``"linear"``, from 0 in
            the first block to the rate in the last.
        token_mixing: builds a block's token mixing; ``ablations.py`` has others.

    Raises:
        ValueError: sizes that do not fit together; the message names the nearest valid ones.
    """

    def __init__(
        self, img_size: int | tuple[int, int] = 224, patch_size: int = 4, in_chans: int = 3, num_classes: int = 1000,
        global_pool: str = "avg", dynamic_img_size: bool = False, embed_dim: int = 80,
        depths: tuple[int, int, int, int] = (2, 2, 6, 2), num_patches: int = 2, strip_width: int = 3,
        mlp_ratio: float = 3.0, drop_rate: float = 0.0, drop_path_rate: float = 0.1,
        drop_path_schedule: str = "constant", token_mixing: Callable[..., nn.Module] = StripMixingBlock,
    ):
        super().__init__()
        self.img_size = check_img_size(img_size, patch_size)
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"depths {tuple(depths)} must be four numbers, each at least 1")
        if num_patches < 1:
            raise ValueError(f"num_patches {num_patches} must be at least 1")
        if embed_dim % (2 * num_patches):
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of 2 x num_patches ({2 * num_patches}): half of "
                             f"the channels are cut into {num_patches} patches")
        if strip_width < 1 or strip_width % 2 == 0:
            raise ValueError(f"strip_width {strip_width} must be odd, at least 1: a strip is centred on its row")
        if drop_path_schedule not in ("constant", "linear"):
            raise ValueError(f"drop_path_schedule {drop_path_schedule!r} is neither 'constant' nor 'linear'")
        self.in_chans, self.patch_size, self.drop_rate = in_chans, patch_size, drop_rate
        self.dynamic_img_size = dynamic_img_size
        dims = [embed_dim * 2**stage for stage in range(4)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        shares = [1.0 if drop_path_schedule == "constant" else i / (sum(depths) - 1) for i in range(sum(depths))]
        rates = iter([drop_path_rate * share for share in shares])
        self.stem = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=False)
        self.stages = nn.ModuleList(
            Stage(*(Block(dim, size, num_patches, strip_width, mlp_ratio, next(rates), token_mixing)
                    for _ in range(depth)))
            for dim, size, depth in zip(dims, map_sizes(self.img_size, patch_size), depths, strict=True)
        )
        self.merging = nn.ModuleList(nn.Conv2d(dim, 2 * dim, 2, 2, bias=False) for dim in dims[:3])
        # Cross-stage shortcuts, which the paper's figure leaves out. m1, m2, m3 are the outputs of the mergings.
        self.shortcut_m1 = nn.Conv2d(dims[1], dims[2], 2, 2, groups=dims[1], bias=False)  # m1 -> s
        self.shortcut_s = nn.Conv2d(dims[2], dims[3], 2, 2, groups=dims[2], bias=False)
        self.shortcut_m2 = nn.Conv2d(dims[2], dims[3], 2, 2, groups=dims[2], bias=False)
        self.norm = nn.BatchNorm2d(dims[3])
        self.reset_classifier(num_classes, global_pool)

    def _run_stages(self, x, count: int) -> list[torch.Tensor]:
        """The outputs of the first ``count`` stages: (N, C, H/4, W/4) to (N, 8C, H/32, W/32) for ``patch_size`` 4."""
        x = check_images(x, self.img_size, 8 * self.patch_size, self.dynamic_img_size)
        outputs = [self.stages[0](self.stem(x))]
        if count > 1:
            m1 = self.merging[0](outputs[0])
            outputs.append(self.stages[1](m1))
        if count > 2:
            m2, s = self.merging[1](outputs[1]), self.shortcut_m1(m1)
            outputs.append(self.stages[2](m2 + s))
        if count > 3:
            m3 = self.merging[2](outputs[2])
            outputs.append(self.stages[3](m3 + self.shortcut_s(s) + self.shortcut_m2(m2)))
        return outputs


VARIANTS = {
    "strip_mlp_tiny_light": {"embed_dim": 80, "depths": (2, 2, 6, 2), "num_patches": 2},
    "strip_mlp_tiny": {"embed_dim": 80, "depths": (2, 2, 12, 2), "num_patches": 2},
    "strip_mlp_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_patches": 4},
    "strip_mlp_base": {"embed_dim": 112, "depths": (2, 2, 18, 2), "num_patches": 4},
}
