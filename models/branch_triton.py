"""Triton kernels for CUDA that weigh and add up LSMM's three branches, each one pass over their maps.

Maps, parts and sums are as in ``map_triton.py``; ``map_ops.py`` has the plain form. Every operator is one launch.
"""

import torch
import triton
import triton.language as tl

from .map_triton import grid_and_blocks, load, place, store, tokens_last


@triton.jit
def load_weights(weights, is_channel):
    """The three branches' weights, each (1, channels)."""
    return (tl.load(weights, mask=is_channel, other=0.0)[None, :],
            tl.load(weights + 1, mask=is_channel, other=0.0)[None, :],
            tl.load(weights + 2, mask=is_channel, other=0.0)[None, :])


@triton.jit
def _sum_kernel(a, a_n, a_c, a_t, b, b_n, b_c, b_t, x, x_n, x_c, x_t, sums, channels, tokens, parts,
                PART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    image, part, c, is_channel = place(channels, parts, BLOCK_C)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for step in range(0, PART, BLOCK_T):
        t = part * PART + step + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & is_channel[None, :]
        total += load(a, a_n, a_c, a_t, image, c, t, mask) + load(b, b_n, b_c, b_t, image, c, t, mask)
        total += load(x, x_n, x_c, x_t, image, c, t, mask)
    tl.store(sums + tl.program_id(0) * channels + c, tl.sum(total, axis=0), mask=is_channel)


@triton.jit
def _mix_kernel(a, a_n, a_c, a_t, b, b_n, b_c, b_t, x, x_n, x_c, x_t, y, y_n, y_c, y_t, weights, channels, tokens,
                parts, PART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    image, part, c, is_channel = place(channels, parts, BLOCK_C)
    of_a, of_b, of_x = load_weights(weights + (image * channels + c) * 3, is_channel)
    for step in range(0, PART, BLOCK_T):
        t = part * PART + step + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & is_channel[None, :]
        total = load(a, a_n, a_c, a_t, image, c, t, mask) * of_a + load(b, b_n, b_c, b_t, image, c, t, mask) * of_b
        total += load(x, x_n, x_c, x_t, image, c, t, mask) * of_x
        store(y, y_n, y_c, y_t, image, c, t, mask, total)


@triton.jit
def _dots_kernel(a, a_n, a_c, a_t, b, b_n, b_c, b_t, x, x_n, x_c, x_t, dy, d_n, d_c, d_t, dots, channels, tokens,
                 parts, PART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    image, part, c, is_channel = place(channels, parts, BLOCK_C)
    of_a = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    of_b = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    of_x = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for step in range(0, PART, BLOCK_T):
        t = part * PART + step + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & is_channel[None, :]
        grad = load(dy, d_n, d_c, d_t, image, c, t, mask)
        of_a += grad * load(a, a_n, a_c, a_t, image, c, t, mask)
        of_b += grad * load(b, b_n, b_c, b_t, image, c, t, mask)
        of_x += grad * load(x, x_n, x_c, x_t, image, c, t, mask)
    dots += (tl.program_id(0) * channels + c) * 3
    tl.store(dots, tl.sum(of_a, axis=0), mask=is_channel)
    tl.store(dots + 1, tl.sum(of_b, axis=0), mask=is_channel)
    tl.store(dots + 2, tl.sum(of_x, axis=0), mask=is_channel)


@triton.jit
def _grads_kernel(dy, d_n, d_c, d_t, da, db, dx, o_n, o_c, o_t, weights, added, channels, tokens, parts,
                  PART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    image, part, c, is_channel = place(channels, parts, BLOCK_C)
    base = tl.load(added + image * channels + c, mask=is_channel, other=0.0)[None, :]
    of_a, of_b, of_x = load_weights(weights + (image * channels + c) * 3, is_channel)
    for step in range(0, PART, BLOCK_T):
        t = part * PART + step + tl.arange(0, BLOCK_T)
        mask = (t < tokens)[:, None] & is_channel[None, :]
        grad = load(dy, d_n, d_c, d_t, image, c, t, mask)
        store(da, o_n, o_c, o_t, image, c, t, mask, grad * of_a + base)
        store(db, o_n, o_c, o_t, image, c, t, mask, grad * of_b + base)
        store(dx, o_n, o_c, o_t, image, c, t, mask, grad * of_x + base)


@torch.library.custom_op("strip_mlp::branch_sums", mutates_args=())
def branch_sums(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums over tokens of a + b + x: maps (N, C, T) -> (N, parts, C), float32."""
    grid, sizes, constants = grid_and_blocks(x)
    sums = x.new_empty(len(x), sizes[2], x.shape[1], dtype=torch.float32)
    _sum_kernel[grid](a, *a.stride(), b, *b.stride(), x, *x.stride(), sums, *sizes, **constants)
    return sums


@torch.library.custom_op("strip_mlp::branch_mix", mutates_args=("y",))
def branch_mix(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, y: torch.Tensor) -> None:
    """Writes ``a * weights[0] + b * weights[1] + x * weights[2]`` into y, of any layout; weights (N, C, 3), float32."""
    grid, sizes, constants = grid_and_blocks(x)
    _mix_kernel[grid](a, *a.stride(), b, *b.stride(), x, *x.stride(), y, *y.stride(), weights, *sizes, **constants)


@torch.library.custom_op("strip_mlp::branch_dots", mutates_args=())
def branch_dots(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Sums over tokens of each map times dy: (N, C, T) -> (N, parts, C, 3), float32."""
    grid, sizes, constants = grid_and_blocks(x)
    dots = x.new_empty(len(x), sizes[2], x.shape[1], 3, dtype=torch.float32)
    _dots_kernel[grid](a, *a.stride(), b, *b.stride(), x, *x.stride(), dy, *dy.stride(), dots, *sizes, **constants)
    return dots


@torch.library.custom_op("strip_mlp::branch_grads", mutates_args=())
def branch_grads(
    dy: torch.Tensor, weights: torch.Tensor, added: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dy * weights[i] + added`` for the three branches, channels last; weights (N, C, 3), added (N, C), float32."""
    da, db, dx = (tokens_last(dy, False) for _ in range(3))
    grid, sizes, constants = grid_and_blocks(dy)
    _grads_kernel[grid](dy, *dy.stride(), da, db, dx, *dx.stride(), weights, added, *sizes, **constants)
    return da, db, dx


@branch_sums.register_fake
def _(a, b, x):
    return x.new_empty(len(x), grid_and_blocks(x)[1][2], x.shape[1], dtype=torch.float32)


@branch_mix.register_fake
def _(a, b, x, weights, y):
    return None


@branch_dots.register_fake
def _(a, b, x, dy):
    return x.new_empty(len(x), grid_and_blocks(x)[1][2], x.shape[1], 3, dtype=torch.float32)


@branch_grads.register_fake
def _(dy, weights, added):
    return tuple(tokens_last(dy, False) for _ in range(3))
