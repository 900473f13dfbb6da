"""The strip-mixing operator (paper section 3) behind one function, ``strip_mix``.

Work: a stage of N images, C_in channels and side L costs ``N * C_in * L * L * K * L`` multiply-accumulates, the K rows
of a strip times its L tokens for each output token, and must read and write ``N * C_in * L * L`` numbers each; the
weights are small beside them. That is ``K * L / 2`` multiply-accumulates per number moved: 84 at L = 56, 10 at L = 7.
By its data sheet (990 TFLOP/s in bf16, 4.8 TB/s) an H200 does about 200 while it moves one, so there memory traffic
bounds the operator in every stage. What it reaches of a device's copy and product is measured in docs/benchmarks.md.

Forms, all the same sums in another order:

- ``plain``: the formula, and the reference for the others; slow.
- ``matmul``: one batched matrix product, a matrix per channel of a patch, over a copy with the K shifted rows side by
  side, which moves several times what it must; runs anywhere, in any precision.
- ``triton``: kernels for CUDA (``strip_triton.py``) that read the shifted rows in place.
"""

import contextlib
import os

import torch
import torch.nn.functional as F

from .errors import InputError

try:
    from . import strip_triton

    _WHY_NO_TRITON = ""
except ImportError as error:  # a PyTorch without Triton; the other forms work without it
    strip_triton, _WHY_NO_TRITON = None, str(error)

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_LONGEST = 128  # tokens of a strip whose square weight the kernels keep on the chip
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, for tests


def strip_mix(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: str, form: str = "auto",
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixes every token with its strip: its own row (column) and the ``K // 2`` rows (columns) on either side.

    With channel ``c = p * D + d`` (patch p, channel d of the patch) and zeros outside the map,
    ``axis="row"`` computes
    ``y[n, c, h, j] = bias[d, j] + sum over k, i of weight[d, j, i, k] * x[n, c, h + k - K//2, i]``
    and ``axis="column"`` the same on the transposed map.

    Under autocast x and the weight are rounded to its precision, in which the result comes.

    Args:
        x: feature map, (N, C, H, W) with C a multiple of D, in any memory layout.
        weight: (D, L, L, K), L the length of a strip: W for rows, H for columns; K odd. Shared by all patches.
        bias: (D, L) or None.
        axis: ``"row"`` or ``"column"``.
        form: ``"plain"``, ``"matmul"``, ``"triton"``, or ``"auto"``: Triton's kernels where tensor cores multiply,
            which is on CUDA from compute capability 8.0 on, in 16 bits, or in TF32 where it is allowed, with L up to
            128; else the matrix product.
        position: (C, H, W) or None: what to add to every image of x beforehand; the kernels add it as they read x.

    Returns:
        (N, C, H, W); channels last where x is.

    Raises:
        InputError: ``"triton"`` where its kernels cannot run.
    """
    if _is_autocast(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if _chosen(form, x, weight) == "triton":
        y = _triton(x, weight, bias, axis, position)
    else:
        form = strip_mix_plain if form == "plain" else _matmul
        y = form(x if position is None else x + position.to(x.dtype), weight, bias, axis)
    return y.contiguous(memory_format=torch.channels_last) if _is_channels_last(x) else y


def strip_mix_into(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, axis: str, position: torch.Tensor
) -> None:
    """Writes ``strip_mix`` into y by Triton's kernels and without a backward.

    Args:
        x, y: (N, C, H, W), each image in plain (C, H, W) order; the images may lie apart.
    """
    strip_triton.mix_into(x, position.to(x.dtype).contiguous(), weight, bias, y, axis, _multiplies_tf32(x))


def uses_kernels(x: torch.Tensor, form: str) -> bool:
    """Whether Triton's kernels compute what is not the strip operator's: eagerly alone, since torch.compile joins the
    plain form's passes by itself. torch.fx traces with proxies, not tensors."""
    if not isinstance(x, torch.Tensor) or torch.compiler.is_compiling() or _triton_lacks(x):
        return False
    return _chosen(form, x) == "triton"


def arrange(x: torch.Tensor, weight: torch.Tensor, form: str) -> torch.Tensor:
    """A map in the layout that ``strip_mix`` reads without a copy: plain (N, C, H, W) order for Triton's kernels."""
    return _Planar.apply(x) if _chosen(form, x, weight) == "triton" and _is_channels_last(x) else x


def fuse(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The 1x1 convolution of ``concat[first, second]``: (N, C1, H, W), (N, C2, H, W) -> (N, C_out, H, W)

    Where the first lies in plain (N, C, H, W) order, both are multiplied where they lie, without a concatenation; the
    product comes out in the layout of ``like`` at no cost.

    Args:
        weight: (C_out, C1 + C2, 1, 1).
        like: a map.
    """
    if _is_channels_last(first) or not first.is_cuda and not _IS_INTERPRETED:
        return F.conv2d(torch.cat([first, second], dim=1), weight)
    with without_autocast(first):
        y = _Fuse.apply(first, second, weight.flatten(1).to(first.dtype), _is_channels_last(like))
    return y


class _Fuse(torch.autograd.Function):
    """``fuse`` by matrix products, which take any layout; each gradient comes back in its map's."""

    @staticmethod
    def forward(ctx, first, second, weight, to_channels_last):
        ctx.save_for_backward(first, second, weight)
        ctx.to_channels_last = to_channels_last
        n, c, h, w = first.shape
        a, b = first.flatten(2), second.flatten(2)  # (N, C1, H * W), (N, C2, H * W)
        u, v = (part.expand(n, -1, -1) for part in weight.tensor_split([c], dim=1))  # (N, C_out, C1), (N, C_out, C2)
        # In place, since torch.baddbmm begins with a copy.
        if to_channels_last:
            return torch.bmm(a.mT, u.mT).baddbmm_(b.mT, v.mT).mT.unflatten(2, (h, w))
        return torch.bmm(u, a).baddbmm_(v, b).unflatten(2, (h, w))

    @staticmethod
    def backward(ctx, dy):
        first, second, weight = ctx.saved_tensors
        n, c, h, w = first.shape
        dy = dy.flatten(2)
        dmaps, planar = [], 0 if ctx.to_channels_last else dy.numel()
        for x, part in zip((first, second), weight.tensor_split([c], dim=1), strict=True):
            part = part.expand(n, -1, -1)
            dx = torch.bmm(dy.mT, part).mT if _is_channels_last(x) else torch.bmm(part.mT, dy)
            dmaps.append(dx.unflatten(2, (h, w)))
            planar += 0 if _is_channels_last(x) else x.numel()
        return (*dmaps, _weight_grad(dy, first.flatten(2), second.flatten(2), planar), None)


def _weight_grad(dy: torch.Tensor, first: torch.Tensor, second: torch.Tensor, planar: int) -> torch.Tensor:
    """Sums over images of ``dy @ x.mT`` for x the first and the second, side by side.

    (N, C_out, T), (N, C1, T), (N, C2, T) -> (C_out, C1 + C2)

    As one product over all images, for which maps in plain order are copied, or as a product for each image, whose
    results are added up: whichever moves less.

    Args:
        planar: the elements of the maps that are in plain order.
    """
    if planar < len(dy) * dy.shape[1] * (first.shape[1] + second.shape[1]):
        dy, first, second = (x.transpose(0, 1).flatten(1) for x in (dy, first, second))  # (C, N * T)
        return torch.cat([dy @ first.mT, dy @ second.mT], dim=1)
    return torch.cat([torch.bmm(dy, x.mT).sum(0) for x in (first, second)], dim=1)


class _Planar(torch.autograd.Function):
    """A copy of a channels-last map in plain order; its gradient comes back channels last."""

    @staticmethod
    def forward(ctx, x):
        return x.flatten(2).contiguous().view(x.shape)  # of a map of four dimensions the compiler may keep the order

    @staticmethod
    def backward(ctx, dy):
        return dy.contiguous(memory_format=torch.channels_last)


def without_autocast(x: torch.Tensor):
    """A context for what autocast would compute on a copy of x in 32 bits, though its kernels read 16."""
    return torch.autocast(x.device.type, enabled=False) if _is_autocast(x) else contextlib.nullcontext()


def _is_autocast(x):
    # The meta device, on which costs are counted, knows no autocast.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _is_channels_last(x):
    return x.stride(1) == 1 and x.shape[1] > 1


def strip_mix_plain(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: str
) -> torch.Tensor:
    """``strip_mix`` as the formula has it: slow, and the reference for every other form."""
    if axis == "column":
        return strip_mix_plain(x.transpose(2, 3), weight, bias, "row").transpose(2, 3)
    n, c, h, _ = x.shape
    d, length, _, width = weight.shape
    x = F.pad(x.reshape(n, c // d, d, h, length), (0, 0, width // 2, width // 2))
    y = torch.einsum("npdhik,djik->npdhj", x.unfold(3, width, 1), weight)
    return (y if bias is None else y + bias[:, None].to(y.dtype)).reshape(n, c, h, length)


def _matmul(x, weight, bias, axis):
    n, c, h, w = x.shape
    d, length, _, width = weight.shape
    is_channels_last = _is_channels_last(x)
    order = (2, 0, 1, 3, 4) if axis == "row" else (2, 0, 1, 4, 3)
    x = x.reshape(n, c // d, d, h, w).permute(order)  # (N, C, H, W) -> (D, N, P, across, along)
    across = x.shape[3]
    x = F.pad(x, (0, 0, width // 2, width // 2))
    strips = torch.cat([x[:, :, :, k:k + across] for k in range(width)], dim=-1)  # (D, N, P, across, K * along)
    strips = strips.reshape(d, -1, width * length)
    matrices = weight.permute(0, 3, 2, 1).reshape(d, width * length, length)
    y = torch.bmm(strips, matrices) if bias is None else torch.baddbmm(bias.unsqueeze(1), strips, matrices)
    y = y.reshape(d, n, c // d, across, length)
    y = y if axis == "row" else y.transpose(3, 4)  # (D, N, P, H, W)
    if is_channels_last:
        return y.permute(1, 3, 4, 2, 0).reshape(n, h, w, c).permute(0, 3, 1, 2)
    return y.permute(1, 2, 0, 3, 4).reshape(n, c, h, w)


def _chosen(form: str, x, weight=None) -> str:
    """The form that ``"auto"`` stands for; any other is itself."""
    if form != "auto":
        return form
    has_tensor_cores = x.is_cuda and _is_ampere() and (x.dtype != torch.float32 or allows_tf32())
    return "triton" if has_tensor_cores and not _triton_lacks(x, weight) else "matmul"


def _triton(x, weight, bias, axis, position):
    lack = _triton_lacks(x, weight)
    if lack:
        raise InputError(f"the strip layers' form 'triton' {lack}; let 'auto' choose (MODEL.STRIP_MLP.FORM auto)")
    if position is not None:
        position = x.new_empty(position.shape).copy_(position)  # rounded and laid out in one pass
    return strip_triton.mix(x.contiguous(), position, weight, bias, axis, _multiplies_tf32(x))


def _multiplies_tf32(x):
    return x.is_cuda and x.dtype == torch.float32 and allows_tf32()


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Whether float32 products on CUDA may be multiplied in TF32."""
    backend = torch.backends.cuda.matmul
    # Since PyTorch 2.9 `allow_tf32` raises where the newer `fp32_precision` was set.
    return backend.fp32_precision == "tf32" if hasattr(backend, "fp32_precision") else backend.allow_tf32


@torch.compiler.assume_constant_result
def _is_ampere() -> bool:
    """Whether the GPU is of Ampere's generation or later; for older ones Triton makes no tensor-core instructions."""
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


def _triton_lacks(x, weight=None) -> str:
    """What keeps Triton's kernels from running; empty where nothing does."""
    if strip_triton is None:
        return f"needs the package triton, which comes with PyTorch's CUDA builds ({_WHY_NO_TRITON})"
    if not (x.is_cuda or x.is_meta or _IS_INTERPRETED):
        return f"needs a CUDA GPU, and this is the device {x.device.type}"
    if x.dtype not in _TRITON_DTYPES:
        return f"computes in at most 32 bits, and this is {x.dtype}"
    if weight is not None and weight.shape[1] > _TRITON_LONGEST:
        return f"takes strips of at most {_TRITON_LONGEST} tokens, and these have {weight.shape[1]}"
    return ""

