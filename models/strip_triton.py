"""Triton kernels of the strip-mixing operator for CUDA, as two PyTorch operators with their backward.

Both read feature maps in plain (N, C, H, W) order, where a channel's map lies in one piece. Seen from a strip, row and
column are the same: a map has A lines *across*, of which a strip takes K, with L tokens *along* each; only the two
strides change places. With m = (n, p, a) running over the lines of all patches that share a channel's weights,

    mix           y[m, j] = bias[j] + sum over k, i of x[m + k - K//2, i] * weight[k, i, j]
    weight_grad   dw[k, i, j] = sum over m of x[m + k - K//2, i] * dy[m, j]

one matrix product per channel of a patch, on tensor cores, accumulated in float32. The gradient of x is ``mix`` itself,
of dy with the weight transposed and flipped. Nothing is added atomically, so results repeat bit for bit.
"""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _line_offsets(m, d, patches, dim, ACROSS: tl.constexpr, LENGTH: tl.constexpr, STEP_ACROSS: tl.constexpr):
    """The image of line m of channel d, where the line begins in that image, and its place a among its lines."""
    a = m % ACROSS
    image_and_patch = m // ACROSS
    patch = image_and_patch % patches
    image = image_and_patch // patches
    channel = patch * dim + d
    return image.to(tl.int64), channel * (ACROSS * LENGTH) + a * STEP_ACROSS, a


@triton.jit
def _load_strips(lines, is_line, along, is_token, STEP_ALONG: tl.constexpr):
    """(lines, tokens) from where the lines begin and how far along each the tokens lie; 0 where there is nothing."""
    if STEP_ALONG == 1:
        strips = tl.load(lines[:, None] + along[None, :], mask=is_line[:, None] & is_token[None, :], other=0.0)
    else:
        # Neighbouring lines lie side by side. A hint of no alignment, so that neighbouring threads read them and not
        # each thread eight, which it could not read at once where they are shifted.
        places = tl.multiple_of(lines[None, :] + along[:, None], [1, 1])
        strips = tl.trans(tl.load(places, mask=is_line[None, :] & is_token[:, None], other=0.0))
    return strips


@triton.jit
def _mix_kernel(x, x_step, position, weight, bias, y, y_step, lines, patches, dim,
                ACROSS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, STEP_ACROSS: tl.constexpr,
                STEP_ALONG: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, HAS_POSITION: tl.constexpr,
                HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr):
    """``BLOCK_M`` lines of one channel: weight (D, K, L in, L out), bias (D, L), maps in plain order.

    An image of x (of y) begins ``x_step`` (``y_step``) numbers after the one before it.
    """
    d = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    along = tl.arange(0, BLOCK_L)
    image, start, a = _line_offsets(m, d, patches, dim, ACROSS, LENGTH, STEP_ACROSS)
    is_token = along < LENGTH
    x += image * x_step
    total = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for k in tl.static_range(WIDTH):
        shift = k - WIDTH // 2
        is_line = (m < lines) & (a + shift >= 0) & (a + shift < ACROSS)
        shifted = shift * STEP_ACROSS
        tokens = _load_strips(x + start + shifted, is_line, along * STEP_ALONG, is_token, STEP_ALONG)
        if HAS_POSITION:
            tokens += _load_strips(position + start + shifted, is_line, along * STEP_ALONG, is_token, STEP_ALONG)
        matrix = tl.load(weight + ((d * WIDTH + k) * LENGTH + along[:, None]) * LENGTH + along[None, :],
                         mask=is_token[:, None] & is_token[None, :], other=0.0)
        total = tl.dot(tokens, matrix, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + d * LENGTH + along, mask=is_token, other=0.0).to(tl.float32)[None, :]
    tl.store((y + image * y_step + start)[:, None] + along[None, :] * STEP_ALONG, total.to(y.dtype.element_ty),
             mask=(m < lines)[:, None] & is_token[None, :])


@triton.jit
def _weight_grad_kernel(x, position, dy, dw, db, lines, patches, dim, PART_LINES: tl.constexpr,
                        ACROSS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, STEP_ACROSS: tl.constexpr,
                        STEP_ALONG: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr,
                        HAS_POSITION: tl.constexpr, BLOCK_M: tl.constexpr):
    """The share of one part of the lines in dw (parts, D, K, L in, L out) and db (parts, D, L), for one k and d."""
    k = tl.program_id(0)
    d = tl.program_id(1)
    part = tl.program_id(2)
    shift = k - WIDTH // 2
    along = tl.arange(0, BLOCK_L)
    is_token = along < LENGTH
    end = tl.minimum((part + 1) * PART_LINES, lines)
    matrix = tl.zeros((BLOCK_L, BLOCK_L), dtype=tl.float32)
    vector = tl.zeros((BLOCK_L,), dtype=tl.float32)
    for first in range(0, PART_LINES, BLOCK_M):
        m = part * PART_LINES + first + tl.arange(0, BLOCK_M)
        image, start, a = _line_offsets(m, d, patches, dim, ACROSS, LENGTH, STEP_ACROSS)
        begin = image * (patches * dim * ACROSS * LENGTH) + start
        is_line = (m < end) & (a + shift >= 0) & (a + shift < ACROSS)
        shifted = shift * STEP_ACROSS
        tokens = _load_strips(x + begin + shifted, is_line, along * STEP_ALONG, is_token, STEP_ALONG)
        if HAS_POSITION:
            tokens += _load_strips(position + start + shifted, is_line, along * STEP_ALONG, is_token, STEP_ALONG)
        grad = _load_strips(dy + begin, m < end, along * STEP_ALONG, is_token, STEP_ALONG)
        matrix = tl.dot(tl.trans(tokens), grad, matrix, input_precision=PRECISION)
        vector += tl.sum(grad.to(tl.float32), axis=0)
    place = (part * dim + d) * WIDTH + k
    tl.store(dw + (place.to(tl.int64) * LENGTH + along[:, None]) * LENGTH + along[None, :], matrix,
             mask=is_token[:, None] & is_token[None, :])
    if shift == 0:
        tl.store(db + (part * dim + d) * LENGTH + along, vector, mask=is_token)


MIX_BLOCKS = [
    triton.Config({"BLOCK_M": block}, num_warps=warps, num_stages=stages)
    for block, warps, stages in ((32, 4, 3), (64, 4, 3), (128, 4, 3), (128, 8, 3), (256, 8, 2))
]
WEIGHT_GRAD_BLOCKS = MIX_BLOCKS[:3]


_only_smallest = False


@contextlib.contextmanager
def smallest_blocks():
    """Inside it, kernels are compiled in their smallest blocks alone, not tuned; in all threads, since gradients are
    computed in one of their own."""
    global _only_smallest
    before, _only_smallest = _only_smallest, True
    try:
        yield
    finally:
        _only_smallest = before


def worth_trying(configs: list[triton.Config], tensors: dict, PRECISION: str, **_) -> list[triton.Config]:
    """The smallest blocks alone inside ``smallest_blocks``; where runs must repeat, since the order of the sums goes
    with the blocks; and for full 32-bit products, which use no tensor cores and whose larger blocks take minutes to
    compile."""
    is_full = tensors["x"].dtype == torch.float32 and PRECISION == "ieee"
    return configs[:1] if _only_smallest or is_full or torch.are_deterministic_algorithms_enabled() else configs


@functools.cache
def _tuned(kernel):
    """A kernel with the blocks that are fastest for its shape; in Triton's interpreter, on the CPU, with the smallest.

    Made at the first launch, since Triton 3.2 looks for a GPU here.
    """
    blocks = {_mix_kernel: MIX_BLOCKS, _weight_grad_kernel: WEIGHT_GRAD_BLOCKS}[kernel]
    if not isinstance(kernel, triton.JITFunction):
        return triton.heuristics({"BLOCK_M": lambda arguments: blocks[0].kwargs["BLOCK_M"]})(kernel)
    # What the best blocks depend on; D, P and the number of lines do not count, so networks share what was tuned.
    return triton.autotune(blocks, key=["ACROSS", "LENGTH", "WIDTH", "STEP_ALONG", "PRECISION"],
                           prune_configs_by={"early_config_prune": worth_trying})(kernel)


@torch.library.custom_op("strip_mlp::mix", mutates_args=())
def mix(
    x: torch.Tensor, position: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, axis: str,
    tf32: bool,
) -> torch.Tensor:
    """The strip layer of ``strip_ops.strip_mix`` for x in plain (N, C, H, W) order.

    Args:
        x: (N, C, H, W), contiguous: float32, bfloat16 or float16.
        position: (C, H, W), contiguous and of x's type, added to every image as it is read; or None.
        weight: (D, L, L, K), of any precision; is rounded to that of x, as autocast would.
        bias: (D, L) or None; is added in float32.
        axis: ``"row"`` or ``"column"``.
        tf32: multiply float32 in TF32.
    """
    y = torch.empty_like(x)
    _launch_mix(x, position, weight, bias, y, axis, tf32)
    return y


@torch.library.custom_op("strip_mlp::mix_into", mutates_args=("y",))
def mix_into(
    x: torch.Tensor, position: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor,
    axis: str, tf32: bool,
) -> None:
    """Writes ``mix`` into y, without a backward. The images of x and of y may lie apart, each in plain order."""
    _launch_mix(x, position, weight, bias, y, axis, tf32)


def _launch_mix(x, position, weight, bias, y, axis, tf32):
    channels = weight.shape[0]
    patches, lines, constants = _shape(x, channels, weight.shape[3], axis, tf32)
    given = weight.permute(0, 3, 2, 1)
    packed = x.new_empty(given.shape).copy_(given)  # (D, K, L in, L out)
    # What is not given is not read; the tensor in its place is of the same type, so nothing is tuned anew.
    _tuned(_mix_kernel)[lambda meta: (triton.cdiv(lines, meta["BLOCK_M"]), channels)](
        x, x.stride(0), x if position is None else position, packed, weight if bias is None else bias.contiguous(),
        y, y.stride(0), lines, patches, channels, **constants, HAS_POSITION=position is not None,
        HAS_BIAS=bias is not None,
    )


@torch.library.custom_op("strip_mlp::weight_grad", mutates_args=())
def weight_grad(
    x: torch.Tensor, position: torch.Tensor | None, dy: torch.Tensor, channels: int, width: int, axis: str, tf32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``mix``'s weight (D, L, L, K) and bias (D, L), both float32; the maps as ``mix`` has them."""
    patches, lines, constants = _shape(x, channels, width, axis, tf32)
    length = constants["LENGTH"]
    # Enough parts for every multiprocessor to have work; their sums meet in a fixed order.
    parts = max(1, min(512 // (width * channels), lines // 128))
    dw = torch.empty(parts, channels, width, length, length, device=x.device, dtype=torch.float32)
    db = torch.empty(parts, channels, length, device=x.device, dtype=torch.float32)
    _tuned(_weight_grad_kernel)[width, channels, parts](
        x, x if position is None else position, dy, dw, db, lines, patches, channels,
        PART_LINES=triton.cdiv(lines, parts), **constants, HAS_POSITION=position is not None,
    )
    return dw.sum(0).permute(0, 3, 2, 1), db.sum(0)


def _shape(x: torch.Tensor, channels: int, width: int, axis: str, tf32: bool) -> tuple[int, int, dict]:
    """The patches, the number of lines that share a channel's weights, and the kernels' constants."""
    n, c, h, w = x.shape
    across, length = (h, w) if axis == "row" else (w, h)
    step_across, step_along = (w, 1) if axis == "row" else (1, w)
    patches = c // channels
    return patches, n * patches * across, {
        "ACROSS": across, "LENGTH": length, "WIDTH": width, "STEP_ACROSS": step_across, "STEP_ALONG": step_along,
        "PRECISION": "tf32" if tf32 else "ieee", "BLOCK_L": max(16, triton.next_power_of_2(length)),
    }


@mix.register_fake
def _(x, position, weight, bias, axis, tf32):
    return torch.empty_like(x)


@mix_into.register_fake
def _(x, position, weight, bias, y, axis, tf32):
    return None


@weight_grad.register_fake
def _(x, position, dy, channels, width, axis, tf32):
    length = x.shape[3] if axis == "row" else x.shape[2]
    weight = x.new_empty(channels, width, length, length, dtype=torch.float32).permute(0, 3, 2, 1)
    return weight, x.new_empty(channels, length, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, position, weight, bias, ctx.axis, ctx.tf32 = inputs
    ctx.save_for_backward(x, position, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, position, weight = ctx.saved_tensors
    dy = dy.contiguous()
    dx = dposition = dw = db = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dx = mix(dy, None, weight.transpose(1, 2).flip(3), None, ctx.axis, ctx.tf32)
        dposition = dx.sum(0) if ctx.needs_input_grad[1] else None
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        dw, db = weight_grad(x, position, dy, weight.shape[0], weight.shape[3], ctx.axis, ctx.tf32)
        dw = dw.to(weight.dtype)
        db = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
    return dx, dposition, dw, db, None, None


mix.register_autograd(_backward, setup_context=_setup_context)


# What PyTorch's counter of operations takes a strip for, as it counts the other forms' products.
@register_flop_formula([torch.ops.strip_mlp.mix, torch.ops.strip_mlp.mix_into])
def _mix_flops(x_shape, position_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    _, length, _, width = weight_shape
    return 2 * math.prod(x_shape) * length * width


@register_flop_formula(torch.ops.strip_mlp.weight_grad)
def _weight_grad_flops(
    x_shape, position_shape, dy_shape, channels, width, axis, tf32, out_shape=None, **kwargs
) -> int:
    return 2 * math.prod(x_shape) * x_shape[3 if axis == "row" else 2] * width
