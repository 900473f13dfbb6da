"""The strip layer with a faster forward pass on CUDA: Triton's kernels (``strip_triton.py``), put in from outside.

``accelerate`` changes the class of a network's strip layers, which stay the same modules with the same parameters. A
layer computes ``StripMLP.forward`` wherever the kernels do not apply, and everywhere if that method was edited.
"""

import copy
import functools
import importlib.util
import logging

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad

from ..strip_mlp import StripMLP

if importlib.util.find_spec("triton"):  # comes with PyTorch's CUDA builds
    from . import strip_triton
else:
    strip_triton = None

logger = logging.getLogger("strip_mlp.fast")

DEVICES = ("cuda",)  # of the kernels; tests add the CPU, where Triton interprets them
_PLAIN_FORWARD = StripMLP.forward
_LONGEST = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}  # tokens whose L x L weights fit on the chip
_TENSORS = (torch.Tensor, nn.Parameter, FakeTensor)  # and no subclass that computes by itself, such as DTensor


def accelerate(net: nn.Module) -> nn.Module:
    """Gives a network's strip layers their faster forward pass, in place; returns the network.

    Nothing changes without Triton, nor for subclasses of ``StripMLP``. If ``StripMLP.forward`` was edited, so that it
    is not what the kernels compute, it is kept, with one warning.
    """
    if strip_triton is not None and _is_what_kernels_compute(StripMLP.forward):
        for module in net.modules():
            if type(module) is StripMLP:
                module.__class__ = FastStripMLP
    return net


def make_plain(net: nn.Module) -> None:
    """Undoes ``accelerate``."""
    for module in net.modules():
        if type(module) is FastStripMLP:
            module.__class__ = StripMLP


class FastStripMLP(StripMLP):
    """``StripMLP`` by Triton's kernels where they apply."""

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        if isinstance(x, torch.fx.Proxy) or x.device.type not in DEVICES or _is_transformed():
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        is_short = max(x.shape[2:]) <= _LONGEST.get(x.dtype, 0)
        has_tensor_cores = x.device.type != "cuda" or _has_tensor_cores(x.device.index, x.dtype)
        if not (is_short and has_tensor_cores and type(self.weight) in _TENSORS and type(self.bias) in _TENSORS):
            return super().forward(x)
        return strip_triton.mix(x.contiguous(), self.weight, self.bias, self.axis)


def _is_transformed() -> bool:
    """Whether something runs that the operators have no rules for: torch.func, forward-mode derivatives, jit.trace; or
    ``StripMLP.forward`` was replaced after ``accelerate``."""
    if StripMLP.forward is not _PLAIN_FORWARD or torch.compiler.is_compiling():
        return StripMLP.forward is not _PLAIN_FORWARD
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


@torch.compiler.assume_constant_result
def _has_tensor_cores(index: int, dtype: torch.dtype) -> bool:
    """Whether Triton multiplies this type by tensor cores: from compute capability 8.0 on, float32 only in TF32."""
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return False
    return dtype != torch.float32 or _allows_tf32()


def _allows_tf32() -> bool:
    backend = torch.backends.cuda.matmul
    # Since PyTorch 2.9 `allow_tf32` raises where the newer `fp32_precision` was set.
    return backend.fp32_precision == "tf32" if hasattr(backend, "fp32_precision") else backend.allow_tf32


# ---- do the kernels compute the formula? ---------------------------------------------------------

def formula(layer: StripMLP, x: torch.Tensor) -> torch.Tensor:
    """What the kernels compute, as the docstring of ``StripMLP`` has it: slow, to compare with.

    (N, C, H, W) -> (N, C, H, W)
    """
    x = x if layer.axis == "row" else x.mT
    d, _, _, k = layer.weight.shape
    x = F.pad(x.unflatten(1, (-1, d)), (0, 0, k // 2, k // 2)).unfold(3, k, 1)  # (N, P, D, H, L, K)
    y = (torch.einsum("npdhik,djik->npdhj", x, layer.weight) + layer.bias[:, None]).flatten(1, 2)
    return y if layer.axis == "row" else y.mT


@functools.cache
def _is_what_kernels_compute(forward) -> bool:
    """Whether ``StripMLP.forward`` is ``formula``; warns if not."""
    problem = _compare(forward, torch.device("cpu"), torch.float64, tolerance=1e-9)
    if problem:
        logger.warning(f"StripMLP.forward was changed ({problem}), so Triton's kernels are not used")
    return not problem


def uses_kernels(net: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a network on this device, in this precision, would run Triton's kernels."""
    is_fast = any(type(module) is FastStripMLP for module in net.modules())
    return is_fast and device.type == "cuda" and _has_tensor_cores(device.index, dtype)


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Runs the kernels once, forward and backward; empty if they agree with ``formula`` on the CPU, else the reason."""
    with strip_triton.smallest_blocks():
        return _compare(lambda layer, x: strip_triton.mix(x, layer.weight, layer.bias, layer.axis), device, dtype,
                        tolerance=1e-3 if dtype == torch.float32 else 3e-2)  # TF32 has 10 bits, bfloat16 7


def _compare(compute, device: torch.device, dtype: torch.dtype, tolerance: float) -> str:
    """Compares ``compute(layer, x)`` and its gradients with ``formula``: empty, or what differs or fails."""
    def results(compute, layer, x):
        x = x.requires_grad_()
        y = compute(layer, x)
        gradients = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy.to(y))
        return [t.detach().cpu().double() for t in (y, *gradients)]

    names = "result", "gradient of x", "gradient of the weight", "gradient of the bias"
    try:
        with (
            torch.random.fork_rng(devices=[]), torch.device("cpu"), unset_fake_temporarily(),
            torch.inference_mode(False), torch.enable_grad(),
        ):
            torch.manual_seed(0)
            for axis in ("row", "column"):
                layer = StripMLP(4, 5, 2, axis).double()  # no network has this size, so none is tuned by it
                x, dy = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
                other = copy.deepcopy(layer).to(device, torch.promote_types(dtype, torch.float32))
                found = results(compute, other, x.to(device, dtype))
                for name, value, expected in zip(names, found, results(formula, layer, x), strict=True):
                    error = float((value - expected).norm() / expected.norm())
                    if not error < tolerance:
                        return f"its {name} along a {axis} differs from the formula's by {error:.1e} (relative)"
    except Exception as error:  # compiler, driver, file system and whoever edits a formula fail in their own ways
        advice = "; TRITON_CACHE_DIR sets the folder for compiled kernels" if isinstance(error, OSError) else ""
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}{advice}"
    return ""
