"""Counts what a step of a network asks of a GPU, without a GPU or any data: bytes, operations, launches and memory.

``count_step`` runs the step on fake tensors, which have shapes and layouts and no contents, on the CPU with CUDA's
autocast. ``count_compiled_step`` counts the plan that torch.compile makes, of which nothing is run. Both charge an
operation every distinct number that it reads, once, and every number that it writes: the least that it can move.
"""

import weakref
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ForeachKernelSchedulerNode
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from engine import EARLY, OPTIONS
from utils import InputError

aten = torch.ops.aten
OVERWRITING = ("copy_", "zero_", "fill_", "zeros_like", "full_like", "ones_like")  # without reading their first input


@dataclass
class Operation:
    """One operation of a step and its cost."""

    phase: str  # forward | backward
    name: str  # of the ATen operator
    bytes: int
    flops: int  # a multiply-accumulate is two
    launches: int


@dataclass
class Traffic:
    """A step's operations in order, and the most memory that its tensors take at once, weights not counted."""

    operations: list[Operation] = field(default_factory=list)
    peak_bytes: int = 0

    def total(self, what: str, phase: str | None = None) -> int:
        """The sum of ``bytes``, ``flops`` or ``launches``."""
        return sum(getattr(op, what) for op in self.operations if phase in (None, op.phase))

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The time that a GPU cannot beat: every operation at the full bandwidth or the full arithmetic rate."""
        return sum(max(op.bytes / bytes_per_second, op.flops / flops_per_second) for op in self.operations)


# ---- a step as it is written ---------------------------------------------------------------------

def count_step(
    network: nn.Module, images: tuple[int, ...], training: bool, dtype: torch.dtype | None = torch.bfloat16
) -> Traffic:
    """Counts a forward pass on a batch of shape (N, C, H, W), with ``training`` also the loss and the backward pass.

    The network is on the CPU, in the memory format and mode to count it in; ``dtype`` is autocast's precision or None.
    """
    layout = layout_of(network)
    with FakeTensorMode() as mode:
        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        weights = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        x = torch.empty(images).contiguous(memory_format=layout)
        with _CudaAutocast(), Counter() as counter:
            counter.note(x)
            with torch.autocast("cpu", dtype, enabled=dtype is not None), torch.set_grad_enabled(training):
                y = functional_call(network, weights, (x,))
                loss = F.cross_entropy(y, torch.empty(y.shape)) if training else None
            if training:
                counter.phase = "backward"
                loss.backward()
    return counter.traffic


def layout_of(network: nn.Module) -> torch.memory_format:
    """Channels last if a weight of the network is, else PyTorch's plain order."""
    layouts = {suggest_memory_format(p) for p in network.parameters() if p.ndim == 4}
    return torch.channels_last if torch.channels_last in layouts else torch.contiguous_format


class _CudaAutocast(TorchFunctionMode):
    """What CUDA's autocast computes in 32 bits and the CPU's does not."""

    FUNCTIONS = {
        F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, torch.softmax, torch.log_softmax,
        torch.Tensor.softmax, torch.Tensor.log_softmax, torch.sum, torch.Tensor.sum, torch.norm, torch.Tensor.norm,
        torch.linalg.vector_norm, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.exp, torch.rsqrt,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FUNCTIONS and torch.is_autocast_enabled("cpu") and "dtype" not in kwargs:
            args, kwargs = tree_map_only(torch.Tensor, _in_32_bits, (args, kwargs))
        return function(*args, **kwargs)


def _in_32_bits(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Counter(TorchDispatchMode):
    """Counts every operation of what runs inside it."""

    def __init__(self):
        super().__init__()
        self.traffic, self.phase = Traffic(), "forward"
        self.live_bytes, self.storages = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        if not _is_free(function, inputs, outputs):
            launches, name = 1, function._schema.name.partition("::")[2]
            moved = sum(map(_bytes, inputs[1:] if name in OVERWRITING else inputs)) + sum(map(_bytes, outputs))
            formula = flop_registry.get(function.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            if name == "convolution_backward":  # a pass for each gradient that is asked for
                dy, x, weight, *_, wanted = args
                read = (_bytes(dy) + _bytes(weight), _bytes(dy) + _bytes(x), _bytes(dy))  # for dx, dw and db
                moved = sum(map(prod, zip(read, wanted, strict=True))) + sum(map(_bytes, outputs))
                launches = sum(wanted)
                flops = 2 * dy.numel() * prod(weight.shape[1:]) * sum(wanted[:2])  # PyTorch's formula ignores groups
            self.traffic.operations.append(Operation(self.phase, name, moved, flops, launches))
        for tensor in outputs:
            self.note(tensor)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # CUDA's allocator rounds up to 512 bytes
        if key in self.storages:
            return

        def free(_):
            self.live_bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, free)
        self.live_bytes += size
        self.traffic.peak_bytes = max(self.traffic.peak_bytes, self.live_bytes)


def _is_free(function, inputs, outputs) -> bool:
    """Whether an operation launches nothing: views, allocations, and what returns no tensor."""
    if function.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided,
                                   aten.new_empty_strided, aten.detach, aten.alias, aten._unsafe_view):
        return True
    if function._schema.is_mutable:
        return False
    storages = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in storages for t in outputs)


def _bytes(tensor: torch.Tensor) -> int:
    """Of a tensor's distinct numbers: an expanded dimension counts once."""
    sides = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return prod(sides) * tensor.element_size()


# ---- a step as torch.compile would fuse it -------------------------------------------------------

class _Planned(Exception):
    """Ends a step that is planned and is not to be run."""


def count_compiled_step(
    network: nn.Module, images: tuple[int, ...], training: bool, dtype: torch.dtype | None = torch.bfloat16
) -> Traffic:
    """Bytes and launches of a step of a compiled network; the arguments are those of ``count_step``.

    The plan is Inductor's for the CPU with a GPU's rule of what to compute twice, so its fusions differ from a GPU's in
    details; convolutions and matrix products are calls, as on a GPU, and one that reads a part of a tensor is charged
    all of it. Operations are not counted, nor is memory.
    """
    if not EARLY:
        raise InputError(f"PyTorch {torch.__version__} cannot plan a compiled step without running it; use 2.11 or "
                         "newer")
    traffic = Traffic()

    def stop(*args):
        raise _Planned

    def plan(graph: GraphLowering):
        """In place of writing and loading the code of a graph."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        phase = "backward" if graph.is_backward else "forward"
        for node in graph.scheduler.nodes:
            combined = isinstance(node, ForeachKernelSchedulerNode)
            kernels = node.get_subkernel_nodes() if combined else [node]
            moved = sum(kernel.get_read_write_buffers_sizes() for kernel in kernels)
            if moved:
                traffic.operations.append(Operation(phase, _kernel_name(node), moved, 0, 1))
        graph.cache_key, graph.cache_path, graph.cache_linemap = "", __file__, []
        return SimpleNamespace(call=stop, runner=None, key="", cache_path=__file__, __file__=__file__, __path__="")

    def combine(scheduler):
        """The kernels that share a launch; PyTorch combines none on a CPU."""
        with mock.patch.object(BaseSchedulerNode, "get_device", return_value=torch.device("cuda")):
            return ForeachKernelSchedulerNode._default_group_nodes_for_combo_kernels(scheduler)

    x = torch.empty(images).contiguous(memory_format=layout_of(network))
    torch.compiler.reset()
    with (
        mock.patch.object(GraphLowering, "compile_to_module", plan),
        mock.patch("torch._inductor.ir.is_cpu", return_value=False),  # asked where a CPU would store an exponential
        mock.patch.object(ForeachKernelSchedulerNode, "group_algorithm_for_combo_kernels", combine),
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


def _kernel_name(node) -> str:
    kernel = getattr(node.node, "python_kernel_name", None) if hasattr(node, "node") else None
    return kernel.rpartition("extern_kernels.")[2].replace("torch.ops.", "") if kernel else "fused loops"
