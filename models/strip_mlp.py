"""Strip-MLP (Cao et al., ICCV 2023, arXiv 2307.11458): read top to bottom beside the paper.

Notation: batch N, channels C, height H, width W; every feature map is (N, C, H, W). P is the number of channel patches,
D = C / P the channels of a patch, L the side of a stage's square feature map.
"""

import contextlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from .strip_ops import strip_mix


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
        self.weight = nn.Parameter(torch.empty(dim // num_patches, length, length, strip_width))  # (D, out, in, K)
        self.bias = nn.Parameter(torch.empty(dim // num_patches, length))
        bound = 1 / math.sqrt(length * strip_width)  # PyTorch's default for a convolution of this fan-in
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x):
        """(N, C, L, L) -> (N, C, L, L)"""
        return strip_mix(x, self.weight, self.bias, self.axis)

    def extra_repr(self) -> str:
        channels, length, _, width = self.weight.shape
        return f"axis={self.axis}, channels_per_patch={channels}, length={length}, strip_width={width}"


class RelativePosition(nn.Module):
    """Relative position map: ``x[n, c, i, j] + table[j - i + L, c]``."""

    def __init__(self, dim: int, length: int):
        super().__init__()
        self.length = length
        self.table = nn.Parameter(torch.empty(2 * length + 1, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x):
        """(N, C, L, L) -> (N, C, L, L)"""
        # Row i of the map reads the L entries from L - i on, so the rows are the table's windows in reverse order.
        rows = self.table[1:-1].unfold(0, self.length, 1).flip(0)  # (L, C, L)
        return x + rows.transpose(0, 1)


class CGSMM(nn.Module):
    """Cascade Group Strip Mixing Module (section 3): a row strip layer, then a column strip layer on its result.

    Args:
        dim: C, the channels of the input.
        length: L, the side of the feature map.
        num_patches: P.
        strip_width: K.
    """

    def __init__(self, dim: int, length: int, num_patches: int, strip_width: int = 3):
        super().__init__()
        self.row_position = RelativePosition(dim, length)
        self.row_strip = StripMLP(dim, length, num_patches, "row", strip_width)
        self.row_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.column_position = RelativePosition(dim, length)
        self.column_strip = StripMLP(dim, length, num_patches, "column", strip_width)
        self.column_fuse = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, L, L) -> (N, C, L, L)"""
        row = self.row_strip(self.row_position(x))
        y = F.gelu(self.norm(self.row_fuse(torch.cat([row, x], dim=1))))
        column = self.column_strip(self.column_position(y))
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
        row, column = self.row_conv(x), self.column_conv(x)
        pooled = (row + column + x).mean((2, 3), keepdim=True)
        scores = self.reweight_fc2(F.gelu(self.reweight_fc1(pooled)))
        weights = scores.view(x.shape[0], -1, 3).softmax(dim=2)[:, :, :, None, None]  # (N, C, 3, 1, 1)
        return column * weights[:, :, 0] + row * weights[:, :, 1] + x * weights[:, :, 2]


class StripMixingBlock(nn.Module):
    """Token mixing (figure 2b): CGSMM on the first half of the channels, LSMM on the second."""

    def __init__(self, dim: int, length: int, num_patches: int, strip_width: int = 3):
        super().__init__()
        self.conv_norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.cgsmm = CGSMM(dim // 2, length, num_patches, strip_width)
        self.lsmm = LSMM(dim // 2)
        self.proj_out = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        """(N, C, L, L) -> (N, C, L, L)"""
        x = self.conv(F.gelu(self.conv_norm(x)))
        x = F.gelu(self.proj_norm(self.proj_in(x)))
        first, second = x.chunk(2, dim=1)
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
        response = x.norm(dim=(1, 2), keepdim=True)
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * response) + self.beta + x


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


class Block(nn.Module):
    """Token mixing, then channel mixing, each a residual branch with drop path."""

    def __init__(self, dim: int, length: int, num_patches: int, strip_width: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.token_mixing = StripMixingBlock(dim, length, num_patches, strip_width)
        self.channel_mixing = ChannelMixingBlock(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        """(N, C, L, L) -> (N, C, L, L)"""
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))


class StripMLPNet(nn.Module):
    """Strip-MLP (figure 2a): four stages at 1/4, 1/8, 1/16 and 1/32 of the input size for ``patch_size`` 4.

    The strip weights depend on the size of the feature maps, so a network serves one square input size.

    Args:
        img_size: side of the input in pixels, a multiple of ``8 * patch_size``.
        patch_size: kernel and stride of the stem.
        in_chans: channels of the input.
        num_classes: outputs of the head; 0 leaves the head out.
        embed_dim: C, the channels of the first stage; they double at every stage.
        depths: blocks of the four stages.
        num_patches: P, the channel patches that share strip weights; divides ``embed_dim / 2``.
        strip_width: K, the rows (columns) of a strip, odd.
        mlp_ratio: alpha, the width of the channel mixing over its input's.
        drop_path_rate: probability that a residual branch is dropped for an image, while training.
        drop_path_schedule: ``"constant"``, the rate in every block, as the released network has it; ``"linear"``, from
            0 in the first block to the rate in the last.

    Raises:
        ValueError: sizes that do not fit together; the message names the nearest that do.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 80,
        depths: tuple[int, int, int, int] = (2, 2, 6, 2),
        num_patches: int = 2,
        strip_width: int = 3,
        mlp_ratio: float = 3.0,
        drop_path_rate: float = 0.1,
        drop_path_schedule: str = "constant",
    ):
        super().__init__()
        img_size = _check_sizes(img_size, patch_size, embed_dim, depths, num_patches, strip_width)
        if drop_path_schedule not in ("constant", "linear"):
            raise ValueError(f"drop_path_schedule {drop_path_schedule!r} is neither 'constant' nor 'linear'")
        self.img_size = img_size
        self.num_classes = num_classes
        self.grad_checkpointing = False
        dims = [embed_dim * 2**stage for stage in range(4)]
        lengths = [img_size // patch_size // 2**stage for stage in range(4)]
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
                *(Block(dim, length, num_patches, strip_width, mlp_ratio, next(rates)) for _ in range(depth))
            )
            for dim, length, depth in zip(dims, lengths, depths, strict=True)
        )
        self.merging = nn.ModuleList(nn.Conv2d(dim, 2 * dim, 2, 2, bias=False) for dim in dims[:3])
        # Cross-stage shortcuts, which the paper's figure leaves out. m1, m2, m3 are the outputs of the mergings.
        self.shortcut_m1 = nn.Conv2d(dims[1], dims[2], 2, 2, groups=dims[1], bias=False)  # m1 -> s
        self.shortcut_s = nn.Conv2d(dims[2], dims[3], 2, 2, groups=dims[2], bias=False)
        self.shortcut_m2 = nn.Conv2d(dims[2], dims[3], 2, 2, groups=dims[2], bias=False)
        self.norm = nn.BatchNorm2d(dims[3])
        self.head = nn.Linear(dims[3], num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x):
        """(N, in_chans, S, S) -> (N, 8 * embed_dim, S/32, S/32) for ``patch_size`` 4, normalised."""
        if x.ndim != 4 or x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"this network was built for images of {self.img_size}x{self.img_size}, got a batch of shape "
                f"{tuple(x.shape)}; resize the images, or build the network with another img_size (legal near "
                f"{x.shape[-1]}: {_legal_sizes(x.shape[-1], self.feature_info[-1]['reduction'])})"
            )
        m1 = self.merging[0](self._run_stage(0, self.stem(x)))
        m2 = self.merging[1](self._run_stage(1, m1))
        s = self.shortcut_m1(m1)
        m3 = self.merging[2](self._run_stage(2, m2 + s))
        return self.norm(self._run_stage(3, m3 + self.shortcut_s(s) + self.shortcut_m2(m2)))

    def forward_head(self, x, pre_logits: bool = False):
        """(N, C, H, W) -> (N, num_classes), or the pooled (N, C) with ``pre_logits``."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """(N, in_chans, S, S) -> (N, num_classes)"""
        return self.forward_head(self.forward_features(x))

    def _run_stage(self, stage: int, x):
        for block in self.stages[stage]:
            if self.grad_checkpointing and torch.is_grad_enabled():
                # A compiled recomputation leaves the statistics alone by itself, and takes no contexts.
                contexts = {"context_fn": partial(_recomputation_contexts, block)}
                x = checkpoint(block, x, use_reentrant=False, **({} if torch.compiler.is_compiling() else contexts))
            else:
                x = block(x)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only the blocks' inputs for the backward pass and computes the rest again there."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a newly drawn one of ``num_classes`` outputs; 0 leaves it out."""
        self.num_classes = num_classes
        weight = self.norm.weight
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(weight.device, weight.dtype)


def _check_sizes(img_size, patch_size, embed_dim, depths, num_patches, strip_width) -> int:
    """The side of the input; raises ValueError when the sizes do not fit together."""
    if isinstance(img_size, (tuple, list)):
        if len(img_size) != 2 or img_size[0] != img_size[1]:
            raise ValueError(f"img_size {tuple(img_size)} is not square; Strip-MLP is built for one square size")
        img_size = img_size[0]
    multiple = 8 * patch_size
    if img_size < multiple or img_size % multiple:
        raise ValueError(
            f"img_size {img_size} is not a multiple of {multiple} (patch size {patch_size} x 8); "
            f"the nearest legal sizes are {_legal_sizes(img_size, multiple)}"
        )
    if len(depths) != 4 or min(depths) < 1:
        raise ValueError(f"depths {tuple(depths)} must be four numbers, each at least 1")
    if embed_dim % (2 * num_patches):
        raise ValueError(
            f"embed_dim {embed_dim} is not a multiple of 2 x num_patches ({2 * num_patches}): half of the channels are "
            f"cut into {num_patches} patches"
        )
    if strip_width % 2 == 0:
        raise ValueError(f"strip_width {strip_width} is even; a strip is centred on its row, so it must be odd")
    return img_size


def _legal_sizes(size: int, multiple: int) -> str:
    below, above = size // multiple * multiple, -(-size // multiple) * multiple
    return " and ".join(str(legal) for legal in sorted({below, above})) if below else f"{multiple} and up"


def _recomputation_contexts(block: nn.Module):
    """Contexts of a checkpointed block's forward pass and of its recomputation, which must not count batches again."""
    return contextlib.nullcontext(), _KeptBuffers(block)


class _KeptBuffers:
    """A context that leaves a module's buffers, which are the statistics of its BatchNorms, as it found them."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.saved = [buffer.clone() for buffer in self.module.buffers()]

    def __exit__(self, *error):
        for buffer, saved in zip(self.module.buffers(), self.saved, strict=True):
            buffer.copy_(saved)


# ---- the variants, registered with timm ----------------------------------------------------------

VARIANTS = {
    "strip_mlp_tiny_light": {"embed_dim": 80, "depths": (2, 2, 6, 2), "num_patches": 2},
    "strip_mlp_tiny": {"embed_dim": 80, "depths": (2, 2, 12, 2), "num_patches": 2},
    "strip_mlp_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_patches": 4},
    "strip_mlp_base": {"embed_dim": 112, "depths": (2, 2, 18, 2), "num_patches": 4},
}

default_cfgs = generate_default_cfgs({
    name: {
        "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "pool_size": (7, 7),
        "crop_pct": 224 / 256, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem", "classifier": "head",
    }
    for name in VARIANTS
})


def _create(variant: str, pretrained: bool, **kwargs) -> StripMLPNet:
    return build_model_with_cfg(StripMLPNet, variant, pretrained, **(VARIANTS[variant] | kwargs))


@register_model
def strip_mlp_tiny_light(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-T*: 18.2 M parameters, 2.5 G multiply-accumulates at 224."""
    return _create("strip_mlp_tiny_light", pretrained, **kwargs)


@register_model
def strip_mlp_tiny(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-T: 24.9 M parameters, 3.7 G multiply-accumulates at 224."""
    return _create("strip_mlp_tiny", pretrained, **kwargs)


@register_model
def strip_mlp_small(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-S: 42.6 M parameters, 6.8 G multiply-accumulates at 224."""
    return _create("strip_mlp_small", pretrained, **kwargs)


@register_model
def strip_mlp_base(pretrained=False, **kwargs) -> StripMLPNet:
    """Strip-MLP-B: 57.2 M parameters, 9.2 G multiply-accumulates at 224."""
    return _create("strip_mlp_base", pretrained, **kwargs)
