"""A block's inference form: fewer passes over the feature maps, the same result within rounding.

What is folded, all of it linear: the BatchNorms after ``proj_in`` and after the first fusion of CGSMM, into the 1x1
convolutions before them; the position maps and biases of the strip layers, into one map added to their result, since
``strip(x + position) + bias = strip(x) + (strip(position) + bias)``; and the last convolution of CGSMM into
``proj_out``, which follows it with nothing between. What can be done in place is. Two BatchNorms stay: the one that
begins the token mixing, between a sum and a GELU, and the network's last, whose output is what ``forward_features``
returns.

Where Triton's kernels run, eagerly on CUDA, ``_by_kernels`` computes the same: a norm or bias and the GELU after it in
one pass, and the maps that a product joins written side by side, so that it reads them without a concatenation.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .map_ops import gelu_into, weigh_branches_into
from .mlp_ops import mlp
from .response_norm import grn_linear
from .strip_ops import strip_mix, strip_mix_into, uses_kernels
from .windows import cut, merge


class FusedStripMixingBlock(nn.Module):
    """What a ``StripMixingBlock`` in eval mode computes, for inference."""

    @torch.no_grad()
    def __init__(self, block: nn.Module):
        super().__init__()
        cgsmm = block.cgsmm
        self.conv_norm, self.conv, self.lsmm = block.conv_norm, block.conv, block.lsmm
        self.size = cgsmm.size
        self.form = block.form

        scale, shift = _affine(block.conv_norm)
        self.register_buffer("norm_scale", scale)
        self.register_buffer("norm_shift", shift)

        scale, shift = _affine(block.proj_norm)
        self.register_buffer("in_weight", block.proj_in.weight * scale[:, None, None, None])
        self.register_buffer("in_bias", scale * block.proj_in.bias + shift)

        for name in ("row", "column"):
            strip, position = getattr(cgsmm, f"{name}_strip"), getattr(cgsmm, f"{name}_position")
            self.register_buffer(f"{name}_weight", strip.weight.detach())
            self.register_buffer(f"{name}_bias", strip.bias.detach())
            self.register_buffer(f"{name}_position", position.map().contiguous())  # (C/2, H, W)
            added = strip_mix(position.map()[None], strip.weight, strip.bias, name)
            self.register_buffer(f"{name}_map", _channels_last(added))  # (1, C/2, H, W)

        scale, shift = _affine(cgsmm.norm)
        self.register_buffer("fuse_weight", cgsmm.row_fuse.weight * scale[:, None, None, None])
        self.register_buffer("fuse_bias", shift)

        of_cgsmm, of_lsmm = block.proj_out.weight.chunk(2, dim=1)
        through = torch.einsum("omhw,mihw->oihw", of_cgsmm, cgsmm.column_fuse.weight)
        self.register_buffer("out_weight", torch.cat([through, of_lsmm], dim=1))

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        if x.shape[2:] == self.size and not x.requires_grad and uses_kernels(x, self.form):
            return self._by_kernels(x)
        x = self.conv(_gelu_(self.conv_norm(x)))
        first, second = (
            _gelu_(F.conv2d(x, weight, bias))
            for weight, bias in zip(self.in_weight.chunk(2), self.in_bias.chunk(2), strict=True)
        )
        windows = cut(first, self.size)
        row = strip_mix(windows, self.row_weight, None, "row", self.form).add_(self.row_map)
        y = _gelu_(F.conv2d(torch.cat([row, windows], dim=1), self.fuse_weight, self.fuse_bias))
        column = strip_mix(y, self.column_weight, None, "column", self.form).add_(self.column_map)
        column = merge(column, first.shape)
        return F.conv2d(torch.cat([first, column, self.lsmm(second)], dim=1), self.out_weight)

    def _by_kernels(self, x):
        """(N, C, H, W) -> (N, C, H, W), of the trained size"""
        (n, c, h, w), lsmm = x.shape, self.lsmm
        x = self.conv(gelu_into(torch.empty_like(x), x, self.norm_scale, self.norm_shift))
        first, second = F.conv2d(x, self.in_weight).chunk(2, dim=1)
        of_first, of_second = self.in_bias.chunk(2)
        maps = first.new_empty(n, 2 * c, h, w)
        in_row, in_first, in_column, in_local = maps.chunk(4, dim=1)
        gelu_into(in_first, first, None, of_first)
        second = gelu_into(torch.empty_like(second), second, None, of_second)
        strip_mix_into(in_row, in_first, self.row_weight, self.row_bias, "row", self.row_position)
        y = _product(maps[:, :c], self.fuse_weight, is_channels_last=False)
        gelu_into(y, y, None, self.fuse_bias)
        strip_mix_into(in_column, y, self.column_weight, self.column_bias, "column", self.column_position)
        weigh_branches_into(in_local, lsmm.column_conv(second), lsmm.row_conv(second), second, lsmm.weigh)
        return _product(maps[:, c // 2:], self.out_weight, is_channels_last=True)


class FusedChannelMixingBlock(nn.Module):
    """What a ``ChannelMixingBlock`` computes, for inference."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.form = block.form
        self.conv, self.norm, self.fc1, self.grn, self.fc2 = block.conv, block.norm, block.fc1, block.grn, block.fc2

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.conv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.norm(x)
        if uses_kernels(x, self.form):
            x = mlp(x, self.fc1, self.grn, self.fc2, self.form)
        else:
            x = grn_linear(_gelu_(self.fc1(x)), self.grn.gamma, self.grn.beta, self.fc2.weight, self.fc2.bias)
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


_gelu_ = torch.ops.aten.gelu_.default


def _product(x: torch.Tensor, weight: torch.Tensor, is_channels_last: bool) -> torch.Tensor:
    """The 1x1 convolution of a map in plain order by a matrix product, whose result takes either layout."""
    n, _, h, w = x.shape
    x, weight = x.flatten(2), weight.flatten(1).to(x.dtype).expand(n, -1, -1)
    y = torch.bmm(x.mT, weight.mT).mT if is_channels_last else torch.bmm(weight, x)
    return y.unflatten(2, (h, w))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (C,) each, of a BatchNorm in eval mode."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale
