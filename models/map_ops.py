"""What the blocks do between convolutions: BatchNorm with GELU, and LSMM's weighted sum of branches.

On a GPU each pass over a map costs what it reads and writes. ``map_triton.py`` and ``branch_triton.py`` do in one pass
what PyTorch does in several. Everywhere else, under torch.compile too, which joins passes by itself, the plain form is
computed: the last line or two of each function.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .recomputation import is_recomputation
from .strip_ops import strip_triton, uses_kernels

if strip_triton is not None:
    from . import branch_triton, map_triton


def norm_gelu(x: torch.Tensor, norm: nn.Module, form: str) -> torch.Tensor:
    """``gelu(norm(x))``: (N, C, H, W) -> (N, C, H, W)

    Args:
        norm: a BatchNorm, of any kind.
        form: as ``strip_ops.strip_mix`` has it.
    """
    if uses_kernels(x, form) and _takes_own_batch(norm, x):
        return _NormGELU.apply(x, norm.weight, norm.bias, None, norm, 1)[0]
    return F.gelu(norm(x))


def project(x: torch.Tensor, conv: nn.Conv2d, norm: nn.Module, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of ``gelu(norm(conv(x)))`` for a 1x1 convolution: (N, C, H, W) -> 2 x (N, C/2, H, W)

    The kernels write the first half in plain (N, C, H, W) order, as CGSMM's strip layers read it.
    """
    if uses_kernels(x, form) and _takes_own_batch(norm, x):
        # The norm takes the convolution's bias away again; only the running mean sees it, and its gradient is 0.
        return _NormGELU.apply(F.conv2d(x, conv.weight), norm.weight, norm.bias, conv.bias, norm, 2)
    return F.gelu(norm(conv(x))).chunk(2, dim=1)


def weigh_branches(
    a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, weigh: Callable[[torch.Tensor], torch.Tensor], form: str
) -> torch.Tensor:
    """``a * w[0] + b * w[1] + x * w[2]`` with ``w = weigh(mean over tokens of a + b + x)``.

    Args:
        a, b, x: (N, C, H, W).
        weigh: (N, C, 1, 1) -> (N, C, 3).
        form: as ``strip_ops.strip_mix`` has it.
    """
    if uses_kernels(x, form):
        shared = {}
        pooled, carrier = _Pool.apply(a, b, x, shared)
        return _Mix.apply(carrier, weigh(pooled), a.detach(), b.detach(), x.detach(), shared)
    w = weigh(sum(branch.mean((2, 3), keepdim=True) for branch in (b, a, x)))
    w = w.to(a.dtype)[:, :, :, None, None]  # (N, C, 3, 1, 1)
    return torch.addcmul(torch.addcmul(a * w[:, :, 0], b, w[:, :, 1]), x, w[:, :, 2])


def gelu_into(y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor) -> torch.Tensor:
    """Writes ``gelu(x * scale + shift)`` into y by a kernel and without a backward; no scale is 1.

    Args:
        x, y: (N, C, H, W) in any layout; they may be the same map.
        scale, shift: (C,).
    """
    map_triton.affine_gelu(x.flatten(2), scale, shift, None, None, y.flatten(2))
    return y


def weigh_branches_into(
    y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor,
    weigh: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Writes ``weigh_branches`` into y, (N, C, H, W) in any layout, by kernels and without a backward."""
    a, b, x, y = (t.flatten(2) for t in (a, b, x, y))
    pooled = branch_triton.branch_sums(a, b, x).sum(1) / x.shape[2]
    branch_triton.branch_mix(a, b, x, weigh(pooled[:, :, None, None]).float().contiguous(), y)


def _takes_own_batch(norm, x) -> bool:
    """Whether a norm takes its statistics from this process's batch; PyTorch refuses a batch of one token."""
    is_plain = type(norm) is nn.BatchNorm2d and norm.training and norm.track_running_stats and norm.affine
    return is_plain and norm.momentum is not None and x.numel() > x.shape[1]


class _NormGELU(torch.autograd.Function):
    """``gelu(norm(x + given))`` in one piece or two, of which it keeps x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, given, norm, pieces):
        x3 = x.flatten(2)
        count = x.numel() // x.shape[1]
        statistics = map_triton.statistics(
            x3[0, :, 0], count, map_triton.moments(x3), weight, bias, given, norm.running_mean, norm.running_var,
            norm.num_batches_tracked, 0.0 if is_recomputation() else norm.momentum, norm.eps)
        ctx.save_for_backward(x, statistics)
        ctx.count, ctx.given = count, given
        is_planar = x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
        ys = []
        for part, of_part in zip(x3.chunk(pieces, 1), statistics.chunk(pieces, 1), strict=True):
            y = map_triton.tokens_last(part, is_planar or len(ys) < pieces - 1)
            map_triton.affine_gelu(part, *of_part[:2], None, None, y)
            ys.append(y.view(len(x), -1, *x.shape[2:]))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, statistics = ctx.saved_tensors
        dx = torch.empty_like(x)
        halves = (t.chunk(len(dys), 1) for t in (x.flatten(2), statistics, dx.flatten(2)))
        sums = []
        for part, of_part, out, dy in zip(*halves, dys, strict=True):
            scale, shift, mean, _ = of_part
            dots = map_triton.gelu_dots(part, dy.flatten(2), shift, scale, mean).sum((0, 1))  # (2, C)
            map_triton.norm_gelu_grad(part, dy.flatten(2), out, of_part, dots, ctx.count)
            sums.append(dots)
        dbias, dweight = torch.cat(sums, 1) if len(sums) > 1 else dots
        dgiven = None if ctx.given is None else torch.zeros_like(ctx.given)
        return dx, dweight * statistics[3], dbias, dgiven, None, None


class _Pool(torch.autograd.Function):
    """The mean over tokens of a + b + x, (N, C, 1, 1), and a carrier: a tensor of x's shape without contents.

    ``_Mix`` gives the carrier the gradient of its result, so that the three maps' gradients, of the mean and of the
    sum, are written in one pass. ``shared`` brings it the weights of the sum.
    """

    @staticmethod
    def forward(ctx, a, b, x, shared):
        ctx.shared = shared
        sums = branch_triton.branch_sums(a.flatten(2), b.flatten(2), x.flatten(2)).sum(1)
        return sums[:, :, None, None] / x.shape[2:].numel(), x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dpooled, dy):
        dy3 = dy.flatten(2)
        grads = branch_triton.branch_grads(dy3, ctx.shared["weights"], dpooled.flatten(1) / dy3.shape[2])
        return (*(grad.view(dy.shape) for grad in grads), None)


class _Mix(torch.autograd.Function):
    """``a * weights[0] + b * weights[1] + x * weights[2]`` for weights (N, C, 3)."""

    @staticmethod
    def forward(ctx, carrier, weights, a, b, x, shared):
        ctx.save_for_backward(a, b, x)
        ctx.dtype = weights.dtype
        shared["weights"] = weights.float().contiguous()
        y = map_triton.tokens_last(x.flatten(2), False)
        branch_triton.branch_mix(a.flatten(2), b.flatten(2), x.flatten(2), shared["weights"], y)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, b, x = (t.flatten(2) for t in ctx.saved_tensors)
        dots = branch_triton.branch_dots(a, b, x, dy.flatten(2)).sum(1)  # (N, C, 3)
        return dy, dots.to(ctx.dtype), None, None, None, None
