"""A block's inference form: fewer passes over the feature maps, the same result within rounding.

What is folded, all of it linear: the BatchNorms after ``proj_in`` and after the first fusion of CGSMM, into the 1x1
convolutions before them; the position maps and biases of the strip layers, into one map added to their result, since
``strip(x + position) + bias = strip(x) + (strip(position) + bias)``; and the last convolution of CGSMM into
``proj_out``, which follows it with nothing between; GRN's beta, into the bias of the linear layer after it. What can be
done in place is. Two BatchNorms stay: the one that begins the token mixing, between a sum and a GELU, and the network's
last, whose output is what ``forward_features`` returns.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .response_norm import channel_norm, grn_scale, scaled_linear
from .strip_ops import strip_mix, without_autocast
from .windows import cut, merge


class FusedStripMixingBlock(nn.Module):
    """What a ``StripMixingBlock`` in eval mode computes, for inference; holds buffers and no parameters to train."""

    @torch.no_grad()
    def __init__(self, block: nn.Module):
        super().__init__()
        cgsmm = block.cgsmm
        self.conv_norm, self.conv, self.lsmm = block.conv_norm, block.conv, block.lsmm
        self.size = cgsmm.size
        self.row_form, self.column_form = cgsmm.row_strip.form, cgsmm.column_strip.form

        scale, shift = _affine(block.proj_norm)
        weight = block.proj_in.weight * scale[:, None, None, None]
        bias = scale * block.proj_in.bias + shift
        for name, part in (("first", slice(None, len(bias) // 2)), ("second", slice(len(bias) // 2, None))):
            self.register_buffer(f"{name}_weight", weight[part].clone())
            self.register_buffer(f"{name}_bias", bias[part].clone())

        for name in ("row", "column"):
            strip, position = getattr(cgsmm, f"{name}_strip"), getattr(cgsmm, f"{name}_position")
            self.register_buffer(f"{name}_weight", strip.weight.detach())
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
        x = self.conv(_gelu_(self.conv_norm(x)))
        first = _gelu_(F.conv2d(x, self.first_weight, self.first_bias))
        second = _gelu_(F.conv2d(x, self.second_weight, self.second_bias))
        windows = cut(first, self.size)
        row = strip_mix(windows, self.row_weight, None, "row", self.row_form).add_(self.row_map)
        y = _gelu_(F.conv2d(torch.cat([row, windows], dim=1), self.fuse_weight, self.fuse_bias))
        column = strip_mix(y, self.column_weight, None, "column", self.column_form).add_(self.column_map)
        column = merge(column, first.shape)
        return F.conv2d(torch.cat([first, column, self.lsmm(second)], dim=1), self.out_weight)


class FusedChannelMixingBlock(nn.Module):
    """What a ``ChannelMixingBlock`` computes, for inference; holds buffers and no parameters to train."""

    @torch.no_grad()
    def __init__(self, block: nn.Module):
        super().__init__()
        self.conv, self.norm, self.fc1 = block.conv, block.norm, block.fc1
        self.register_buffer("gamma", block.grn.gamma.detach())
        self.register_buffer("weight", block.fc2.weight.detach())
        self.register_buffer("bias", block.fc2.bias + block.fc2.weight @ block.grn.beta.flatten())

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        x = self.conv(x).permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = _gelu_(self.fc1(self.norm(x)))
        with without_autocast(x):
            scale = grn_scale(channel_norm(x), self.gamma)
            x = scaled_linear(x, scale, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


_gelu_ = torch.ops.aten.gelu_.default


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift, (C,) each, of a BatchNorm in eval mode."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale
