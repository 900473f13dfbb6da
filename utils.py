"""Small helpers: random states, deterministic algorithms, and the count of operations."""

import math
import os
import random

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Makes every operation bitwise reproducible, also on a GPU; one that cannot be raises RuntimeError.

    Call it before CUDA starts, because cuBLAS reads its environment variable then.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def get_rng_state() -> dict:
    """This process's random states, in plain containers and tensors."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict) -> None:
    """Restores the result of ``get_rng_state``."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])

@torch.no_grad()
def count_macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image of ``shape`` (C, H, W): convolutions, strip layers and linear layers."""
    training, parameter = model.training, next(model.parameters())
    model.eval()
    # PyTorch's counter lacks this in-place product of (N, M, K) and (N, K, P), which fused strip layers use.
    in_place = {torch.ops.aten.baddbmm_: lambda total, a, b, **other: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    return counter.get_total_flops() // 2  # the counter counts a multiply-accumulate as two operations
