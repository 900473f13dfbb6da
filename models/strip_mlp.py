"""Strip-MLP (Cao et al., ICCV 2023, arXiv 2307.11458), to be read beside the paper.

Notation: batch N, channels C, height H, width W; every feature map is (N, C, H, W). P is the number of channel patches,
D = C / P the channels of a patch, L the length of a strip: W for a row, H for a column.
"""

import math
from collections.abc import Callable

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import nn
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .fused import FusedChannelMixingBlock, FusedStripMixingBlock
from .input_size import check_images, check_img_size, map_sizes
from .map_ops import norm_gelu, project, weigh_branches
from .mlp_ops import mlp
from .response_norm import grn
from .strip_ops import arrange, fuse, strip_mix, without_autocast
from .timm_interface import TimmInterface
from .windows import cut, merge

# torch.fx does not trace into these functions, which branch on the input's size, type and device.
for _name in ("_layer_norm", "arrange", "check_images", "cut", "fuse", "grn", "merge", "strip_mix"):
    torch.fx.wrap(_name)


class StripMLP(nn.Module):
    """Strip MLP layer (section 3): a linear layer over each token's strip of rows or columns.

    The P channel patches share the weights, and so do all rows (columns); each of the D channels of a patch has its
    own.

    Args:
        dim: C, the channels of the input.
        length: L, the tokens in a row or column.
        num_patches: P.
        axis: ``"row"`` or ``"column"``.
        strip_width: K, the rows or columns of a strip.
    """

    def __init__(self, dim: int, length: int, num_patches: int, axis: str, strip_width: int = 3):
        super().__init__()
        self.axis = axis
        self.form = "auto"  # how to compute the layer, see strip_ops; build_model sets it from the config
        self.weight = nn.Parameter(torch.empty(dim // num_patches, length, length, strip_width))  # (D, out, in, K)
        self.bias = nn.Parameter(torch.empty(dim // num_patches, length))
        bound = 1 / math.sqrt(length * strip_width)  # PyTorch's default for a convolution of this fan-in
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x, position=None):
        """(N, C, H, W), and a position map (C, H, W) to be added to it -> (N, C, H, W)"""
        return strip_mix(x, self.weight, self.bias, self.axis, self.form, position)

    def extra_repr(self) -> str:
        channels, length, _, width = self.weight.shape
        return f"axis={self.axis}, channels_per_patch={channels}, length={length}, strip_width={width}"


class RelativePosition(nn.Module):
    """Relative position map: ``x[n, c, i, j] + table[j - i + H, c]``.

    Args:
        dim: C, the channels of the input.
        size: (H, W) of the feature map, or its side if it is square. The table has ``H + W + 1`` entries, like the ``2
            * L + 1`` of the released network for a square map; the first and the last are never read.
    """

    def __init__(self, dim: int, size: int | tuple[int, int]):
        super().__init__()
        height, self.width = to_2tuple(size)
        self.table = nn.Parameter(torch.empty(height + self.width + 1, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def map(self):
        """() -> (C, H, W)"""
        # Row i of the map reads the W entries from H - i on, so the rows are the table's windows in reverse order.
        rows = self.table[1:-1].unfold(0, self.width, 1).transpose(1, 2).flip(0)  # (H, W, C)
        return rows.permute(2, 0, 1)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        return x + self.map().to(x.dtype)  # otherwise the sum under autocast would have 32 bits


class CGSMM(nn.Module):
    """Cascade Group Strip Mixing Module (section 3): a row strip layer, then a column strip layer on its result.

    Args:
        dim: C, the channels of the input.
        size: (H, W) of the feature map, or its side if it is square.
        num_patches: P.
        strip_width: K.
    """

    def __init__(self, dim: int, size: int | tuple[int, int], num_patches: int, strip_width: int = 3):
        super().__init__()
        self.size = height, width = to_2tuple(size)
        self.form = "auto"
        self.row_position = RelativePosition(dim, size)
        self.row_strip = StripMLP(dim, width, num_patches, "row", strip_width)
        self.row_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.column_position = RelativePosition(dim, size)
        self.column_strip = StripMLP(dim, height, num_patches, "column", strip_width)
        self.column_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        given, x = x, arrange(x, self.row_strip.weight, self.row_strip.form)
        windows = cut(x, self.size)  # the map itself if it has the trained size
        row = self.row_strip(windows, self.row_position.map())
        y = norm_gelu(fuse(row, windows, self.row_fuse.weight, like=windows), self.norm, self.form)
        column = merge(self.column_strip(y, self.column_position.map()), x.shape)
        return fuse(x, column, self.column_fuse.weight, like=given)

    def set_size(self, size: tuple[int, int]) -> None:
        """Gives the strip layers and position tables the shapes for maps of ``size``; load their weights afterwards."""
        height, width = self.size = size
        for strip, length in ((self.row_strip, width), (self.column_strip, height)):
            d, _, _, k = strip.weight.shape
            strip.weight.data = strip.weight.new_empty(d, length, length, k)
            strip.bias.data = strip.bias.new_empty(d, length)
        for position in (self.row_position, self.column_position):
            position.width = width
            position.table.data = position.table.new_empty(height + width + 1, position.table.shape[1])


class LSMM(nn.Module):
    """Local Strip Mixing Module (section 3): two depthwise strip convolutions and the input, weighted per channel.

    The weights come from the pooled sum of the three branches. The paper's figure puts the MLP before the pooling; the
    released network pools first, and so does this one.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.form = "auto"
        self.row_conv = nn.Conv2d(dim, dim, (3, 7), padding=(1, 3), groups=dim, bias=False)
        self.column_conv = nn.Conv2d(dim, dim, (7, 3), padding=(3, 1), groups=dim, bias=False)
        self.reweight_fc1 = nn.Conv2d(dim, dim // 2, 1)
        self.reweight_fc2 = nn.Conv2d(dim // 2, 3 * dim, 1)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        # column * w[0] + row * w[1] + x * w[2] with w = weigh(mean over tokens of column + row + x)
        return weigh_branches(self.column_conv(x), self.row_conv(x), x, self.weigh, self.form)

    def weigh(self, pooled):
        """(N, C, 1, 1) -> (N, C, 3), the weights of column, row and input"""
        scores = self.reweight_fc2(F.gelu(self.reweight_fc1(pooled)))
        return scores.view(pooled.shape[0], -1, 3).softmax(dim=2)


class StripMixingBlock(nn.Module):
    """Token mixing (figure 2b): CGSMM on the first half of the channels, LSMM on the second."""

    def __init__(self, dim: int, size: int | tuple[int, int], num_patches: int, strip_width: int = 3):
        super().__init__()
        self.form = "auto"
        self.conv_norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.cgsmm = CGSMM(dim // 2, size, num_patches, strip_width)
        self.lsmm = LSMM(dim // 2)
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        y = self.conv(norm_gelu(x, self.conv_norm, self.form))
        first, second = project(y, self.proj_in, self.proj_norm, self.form)  # the halves of gelu(norm(proj_in(y)))
        return fuse(self.cgsmm(first), self.lsmm(second), self.proj_out.weight, like=x)


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
        return grn(x, self.gamma, self.beta)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that keeps its input's precision under autocast; its sums have 32 bits anyway."""

    def forward(self, x):
        """(..., C) -> (..., C)"""
        return _layer_norm(x, self.weight, self.bias, self.eps)


def _layer_norm(x, weight, bias, eps: float):
    with without_autocast(x):
        return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


class ChannelMixingBlock(nn.Module):
    """Channel mixing (figure 2c): a 7x7 depthwise convolution, then an MLP of width ``mlp_ratio * dim`` with GRN."""

    def __init__(self, dim: int, mlp_ratio: float = 3.0):
        super().__init__()
        hidden_dim = int(mlp_ratio * dim)
        self.form = "auto"
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False)
        self.norm = LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.grn = GRN(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.conv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = mlp(self.norm(x), self.fc1, self.grn, self.fc2, self.form)  # fc2(grn(gelu(fc1(x))))
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


class DropPathAdd(DropPath):
    """``x + drop_path(branch)``, the sum of a block, in one pass over the maps."""

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

    def fuse(self) -> "Block":
        """Replaces its parts by their inference forms; an ablated token mixing has none and stays unchanged."""
        if type(self.token_mixing) is StripMixingBlock:
            self.token_mixing = FusedStripMixingBlock(self.token_mixing.eval())
        if type(self.channel_mixing) is ChannelMixingBlock:
            self.channel_mixing = FusedChannelMixingBlock(self.channel_mixing)
        return self


class StripMLPNet(TimmInterface):
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
        InputError: sizes that do not fit together; the message names the nearest valid ones.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dynamic_img_size: bool = False,
        embed_dim: int = 80,
        depths: tuple[int, int, int, int] = (2, 2, 6, 2),
        num_patches: int = 2,
        strip_width: int = 3,
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        drop_path_schedule: str = "constant",
        token_mixing: Callable[..., nn.Module] = StripMixingBlock,
    ):
        super().__init__()
        self.img_size = check_img_size(img_size, patch_size)
        if len(depths) != 4 or min(depths) < 1:
            raise InputError(f"depths {tuple(depths)} must be four numbers, each at least 1")
        if num_patches < 1:
            raise InputError(f"num_patches {num_patches} must be at least 1")
        if embed_dim % (2 * num_patches):
            raise InputError(f"embed_dim {embed_dim} is not a multiple of 2 x num_patches ({2 * num_patches}): half of "
                             f"the channels are cut into {num_patches} patches")
        if strip_width < 1 or strip_width % 2 == 0:
            raise InputError(f"strip_width {strip_width} must be odd, at least 1: a strip is centred on its row")
        if drop_path_schedule not in ("constant", "linear"):
            raise InputError(f"drop_path_schedule {drop_path_schedule!r} is neither 'constant' nor 'linear'")
        self.in_chans = in_chans
        self.dynamic_img_size = dynamic_img_size
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        dims = [embed_dim * 2**stage for stage in range(4)]
        sizes = map_sizes(self.img_size, patch_size)
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"stages.{stage}"}
            for stage, dim in enumerate(dims)
        ]

        blocks = sum(depths)
        shares = [1.0 if drop_path_schedule == "constant" else i / (blocks - 1) for i in range(blocks)]
        rates = iter([drop_path_rate * share for share in shares])
        self.stem = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(dim, size, num_patches, strip_width, mlp_ratio, next(rates), token_mixing)
                    for _ in range(depth)
                )
            )
            for dim, size, depth in zip(dims, sizes, depths, strict=True)
        )
        self.merging = nn.ModuleList(nn.Conv2d(dim, 2 * dim, 2, 2, bias=False) for dim in dims[:3])
        # Cross-stage shortcuts, which the paper's figure leaves out. m1, m2, m3 are the outputs of the mergings.
        self.shortcut_m1 = nn.Conv2d(dims[1], dims[2], 2, 2, groups=dims[1], bias=False)  # m1 -> s
        self.shortcut_s = nn.Conv2d(dims[2], dims[3], 2, 2, groups=dims[2], bias=False)
        self.shortcut_m2 = nn.Conv2d(dims[2], dims[3], 2, 2, groups=dims[2], bias=False)
        self.norm = nn.BatchNorm2d(dims[3])
        self.reset_classifier(num_classes, global_pool)

    def forward_features(self, x):
        """(N, in_chans, H, W) -> (N, 8 * embed_dim, H/32, W/32) for ``patch_size`` 4, normalised."""
        return self.norm(self._run_stages(x, len(self.stages))[-1])

    def forward_head(self, x, pre_logits: bool = False):
        """(N, C, H, W) -> (N, num_classes), or the pooled (N, C) with ``pre_logits``."""
        if self.global_pool:
            x = x.mean((2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """(N, in_chans, H, W) -> (N, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def _run_stages(self, x, count: int) -> list[torch.Tensor]:
        """The outputs of the first ``count`` stages."""
        x = check_images(x, self.img_size, 8 * self.stem.stride[0], self.dynamic_img_size)
        outputs = [self._run_stage(0, self.stem(x))]
        if count > 1:
            m1 = self.merging[0](outputs[0])
            outputs.append(self._run_stage(1, m1))
        if count > 2:
            m2, s = self.merging[1](outputs[1]), self.shortcut_m1(m1)
            outputs.append(self._run_stage(2, m2 + s))
        if count > 3:
            m3 = self.merging[2](outputs[2])
            outputs.append(self._run_stage(3, m3 + self.shortcut_s(s) + self.shortcut_m2(m2)))
        return outputs

    def _run_stage(self, stage: int, x):
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.stages[stage](x)
        for block in self.stages[stage]:
            x = checkpoint(block, x, use_reentrant=False)
        return x


VARIANTS = {
    "strip_mlp_tiny_light": {"embed_dim": 80, "depths": (2, 2, 6, 2), "num_patches": 2},
    "strip_mlp_tiny": {"embed_dim": 80, "depths": (2, 2, 12, 2), "num_patches": 2},
    "strip_mlp_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_patches": 4},
    "strip_mlp_base": {"embed_dim": 112, "depths": (2, 2, 18, 2), "num_patches": 4},
}
