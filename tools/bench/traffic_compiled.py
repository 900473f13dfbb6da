"""Counts the bytes and kernels of a step as torch.compile would fuse it: Inductor's plan, of which nothing is run."""

from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn
from torch._inductor.graph import GraphLowering

from engine import EARLY, OPTIONS, keep_activation_layout
from tools.bench.traffic import Operation, Traffic, layout_of
from utils import InputError


class _Planned(Exception):
    """Ends a step that is planned and is not to be run."""


class _Module:
    """Stands for the code that Inductor would write."""

    __file__ = __path__ = cache_path = key = __file__
    runner = None

    @staticmethod
    def call(*args):
        raise _Planned


def count_compiled_step(
    network: nn.Module, images: tuple[int, ...], training: bool, dtype: torch.dtype | None = torch.bfloat16
) -> Traffic:
    """Bytes and launches of a step of a compiled network; each kernel is charged what it reads and writes, once.

    The plan is Inductor's for the CPU with a GPU's rule of what to compute twice, so its fusions differ from a GPU's in
    details; convolutions and matrix products are calls, as on a GPU, and one that reads a part of a tensor is charged
    all of it. Operations are not counted, nor is memory.

    Args:
        network: on the CPU, in the memory format and mode to count it in.
        images: shape (N, C, H, W) of a batch.
        training: whether to count the backward pass.
        dtype: autocast's precision; None: no autocast.

    Raises:
        InputError: PyTorch is too old to plan the backward pass with the forward pass.
        RuntimeError: the network does not compile in one piece.
    """
    if not EARLY:
        raise InputError(f"PyTorch {torch.__version__} cannot plan a compiled step without running it; use 2.11 or "
                         "newer")
    traffic = Traffic()

    def plan(graph: GraphLowering):
        graph.init_wrapper_code()
        graph._update_scheduler()
        phase = "backward" if graph.is_backward else "forward"
        for node in graph.scheduler.nodes:
            moved = node.get_read_write_buffers_sizes()
            if moved:
                traffic.operations.append(Operation(phase, _name(node), "", moved, 0, 1))
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", _Module.cache_path, []
        return _Module

    x = torch.empty(images).contiguous(memory_format=layout_of(network))
    torch.compiler.reset()
    keep_activation_layout()
    with (
        mock.patch.object(GraphLowering, "compile_to_module", plan),
        mock.patch("torch._inductor.ir.is_cpu", return_value=False),  # asked where a CPU would store an exponential
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(EARLY),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
        torch.set_grad_enabled(training),
    ):
        try:
            torch.compile(network, fullgraph=True, options=OPTIONS)(x)
        except _Planned:
            pass
    torch.compiler.reset()
    return traffic


def _name(node) -> str:
    kernel = getattr(node.node, "python_kernel_name", None) if hasattr(node, "node") else None
    return kernel.rpartition("extern_kernels.")[2].replace("torch.ops.", "") if kernel else "fused loops"
