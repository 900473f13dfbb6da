"""Triton kernels of the strip MLP layer for CUDA, as two PyTorch operators with their backward.

Both read contiguous feature maps (N, C, H, W). Seen from a strip, row and column are the same: a map has A lines
*across*, of which a strip takes K, with L tokens *along* each; only the two strides change places. With m = (n, p, a)
running over the lines of all patches that share a channel's weights,

    mix           y[m, j] = bias[j] + sum over k, i of x[m + k - K//2, i] * weight[k, i, j]
    weight_grad   dw[k, i, j] = sum over m of x[m + k - K//2, i] * dy[m, j]

one matrix product per channel of a patch, on tensor cores, accumulated in float32. The gradient of x is ``mix`` itself,
of dy with the weight transposed and flipped. Nothing is added atomically, so results repeat bit for bit.

Work: a stage of N images, C channels and side L costs ``N * C * L * L * K * L`` multiply-accumulates and must read and
write ``N * C * L * L`` numbers each; the weights are small beside them. That is ``K * L / 2`` multiply-accumulates per
number moved: 84 at L = 56, 10 at L = 7. By its data sheet (990 TFLOP/s in bf16, 4.8 TB/s) an H200 does about 200 while
it moves one, so memory traffic bounds the layer in every stage. ``StripMLP.forward``, which copies the K shifted rows
side by side, moves several times as much.
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
    """Where line m of channel d begins, and its place a among the lines of its map."""
    a = m % ACROSS
    image_and_patch = m // ACROSS
    patch = image_and_patch % patches
    image = image_and_patch // patches
    channel = image.to(tl.int64) * (patches * dim) + patch * dim + d
    return channel * (ACROSS * LENGTH) + a * STEP_ACROSS, a


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
def _mix_kernel(x, weight, bias, y, lines, patches, dim,
                ACROSS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, STEP_ACROSS: tl.constexpr,
                STEP_ALONG: tl.constexpr, BLOCK_L: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr):
    """``BLOCK_M`` lines of one channel: weight (D, K, L in, L out), bias (D, L)."""
    d = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    along = tl.arange(0, BLOCK_L)
    start, a = _line_offsets(m, d, patches, dim, ACROSS, LENGTH, STEP_ACROSS)
    is_token = along < LENGTH
    total = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    for k in tl.static_range(WIDTH):
        shift = k - WIDTH // 2
        is_line = (m < lines) & (a + shift >= 0) & (a + shift < ACROSS)
        tokens = _load_strips(x + start + shift * STEP_ACROSS, is_line, along * STEP_ALONG, is_token, STEP_ALONG)
        matrix = tl.load(weight + ((d * WIDTH + k) * LENGTH + along[:, None]) * LENGTH + along[None, :],
                         mask=is_token[:, None] & is_token[None, :], other=0.0)
        total = tl.dot(tokens, matrix, total, input_precision="tf32")  # of float32; 16 bits are exact
    if HAS_BIAS:
        total += tl.load(bias + d * LENGTH + along, mask=is_token, other=0.0).to(tl.float32)[None, :]
    tl.store((y + start)[:, None] + along[None, :] * STEP_ALONG, total.to(y.dtype.element_ty),
             mask=(m < lines)[:, None] & is_token[None, :])


@triton.jit
def _weight_grad_kernel(x, dy, dw, db, lines, patches, dim, PART_LINES: tl.constexpr,
                        ACROSS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, STEP_ACROSS: tl.constexpr,
                        STEP_ALONG: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr):
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
        start, a = _line_offsets(m, d, patches, dim, ACROSS, LENGTH, STEP_ACROSS)
        is_line = (m < end) & (a + shift >= 0) & (a + shift < ACROSS)
        tokens = _load_strips(x + start + shift * STEP_ACROSS, is_line, along * STEP_ALONG, is_token, STEP_ALONG)
        grad = _load_strips(dy + start, m < end, along * STEP_ALONG, is_token, STEP_ALONG)
        matrix = tl.dot(tl.trans(tokens), grad, matrix, input_precision="tf32")
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


def worth_trying(configs: list[triton.Config], *_, **__) -> list[triton.Config]:
    """The smallest blocks alone inside ``smallest_blocks``, and where runs must repeat, since the order of the sums
    goes with the blocks."""
    return configs[:1] if _only_smallest or torch.are_deterministic_algorithms_enabled() else configs


@functools.cache
def _tuned(kernel):
    """A kernel with the blocks that are fastest for its shape; in Triton's interpreter, on the CPU, with the smallest.

    Made at the first launch, since Triton 3.2 looks for a GPU here.
    """
    blocks = {_mix_kernel: MIX_BLOCKS, _weight_grad_kernel: WEIGHT_GRAD_BLOCKS}[kernel]
    if not isinstance(kernel, triton.JITFunction):
        return triton.heuristics({"BLOCK_M": lambda arguments: blocks[0].kwargs["BLOCK_M"]})(kernel)
    # What the best blocks depend on; D, P and the number of lines do not count, so networks share what was tuned.
    return triton.autotune(blocks, key=["ACROSS", "LENGTH", "WIDTH", "STEP_ALONG"],
                           prune_configs_by={"early_config_prune": worth_trying})(kernel)


@torch.library.custom_op("strip_mlp::mix", mutates_args=())
def mix(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, axis: str) -> torch.Tensor:
    """``StripMLP.forward``: (N, C, H, W) -> (N, C, H, W), both contiguous.

    Args:
        x: float32, which is multiplied in TF32, bfloat16 or float16.
        weight: (D, L, L, K), of any precision; is rounded to that of x, as autocast would.
        bias: (D, L) or None; is added in float32.
        axis: ``"row"`` or ``"column"``.
    """
    y = torch.empty_like(x)
    channels = weight.shape[0]
    patches, lines, constants = _shape(x, channels, weight.shape[3], axis)
    given = weight.permute(0, 3, 2, 1)
    packed = x.new_empty(given.shape).copy_(given)  # (D, K, L in, L out)
    with _device_of(x):
        # A bias that is not given is not read; the tensor in its place has its type, so nothing is compiled anew.
        _tuned(_mix_kernel)[lambda meta: (-(-lines // meta["BLOCK_M"]), channels)](
            x, packed, weight if bias is None else bias.contiguous(), y, lines, patches, channels, **constants,
            HAS_BIAS=bias is not None,
        )
    return y


@torch.library.custom_op("strip_mlp::weight_grad", mutates_args=())
def weight_grad(
    x: torch.Tensor, dy: torch.Tensor, channels: int, width: int, axis: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``mix``'s weight (D, L, L, K) and bias (D, L), both float32; x and dy contiguous."""
    patches, lines, constants = _shape(x, channels, width, axis)
    length = constants["LENGTH"]
    # Enough parts for every multiprocessor to have work; their sums meet in a fixed order.
    parts = max(1, min(512 // (width * channels), lines // 128))
    dw = torch.empty(parts, channels, width, length, length, device=x.device, dtype=torch.float32)
    db = torch.empty(parts, channels, length, device=x.device, dtype=torch.float32)
    with _device_of(x):
        _tuned(_weight_grad_kernel)[width, channels, parts](
            x, dy, dw, db, lines, patches, channels, PART_LINES=-(-lines // parts), **constants,
        )
    return dw.sum(0).permute(0, 3, 2, 1), db.sum(0)


def _device_of(x: torch.Tensor):
    """Triton launches on the current device, which x's may not be."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _shape(x: torch.Tensor, channels: int, width: int, axis: str) -> tuple[int, int, dict]:
    """The patches, the number of lines that share a channel's weights, and the kernels' constants."""
    n, c, h, w = x.shape
    across, length = (h, w) if axis == "row" else (w, h)
    step_across, step_along = (w, 1) if axis == "row" else (1, w)
    patches = c // channels
    return patches, n * patches * across, {
        "ACROSS": across, "LENGTH": length, "WIDTH": width, "STEP_ACROSS": step_across, "STEP_ALONG": step_along,
        "BLOCK_L": max(16, 1 << (length - 1).bit_length()),
    }


@mix.register_fake
def _(x, weight, bias, axis):
    return torch.empty_like(x)


@weight_grad.register_fake
def _(x, dy, channels, width, axis):
    length = x.shape[3] if axis == "row" else x.shape[2]
    weight = x.new_empty(channels, width, length, length, dtype=torch.float32).permute(0, 3, 2, 1)
    return weight, x.new_empty(channels, length, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.axis = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dy = dy.contiguous()
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = mix(dy, weight.transpose(1, 2).flip(3), None, ctx.axis)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dw, db = weight_grad(x, dy, weight.shape[0], weight.shape[3], ctx.axis)
        dw = dw.to(weight.dtype)
        db = None if ctx.bias_dtype is None else db.to(ctx.bias_dtype)
    return dx, dw, db, None


mix.register_autograd(_backward, setup_context=_setup_context)


# What PyTorch's counter of operations takes a strip for, as it counts the products of ``StripMLP.forward``.
@register_flop_formula(torch.ops.strip_mlp.mix)
def _mix_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    _, length, _, width = weight_shape
    return 2 * math.prod(x_shape) * length * width


@register_flop_formula(torch.ops.strip_mlp.weight_grad)
def _weight_grad_flops(x_shape, dy_shape, channels, width, axis, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * x_shape[3 if axis == "row" else 2] * width
