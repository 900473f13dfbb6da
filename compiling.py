"""torch.compile for a training: where it is the default, its settings, and the fallback where it fails."""

import logging
import os
from pathlib import Path

import torch
import torch._functorch.config
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from models import InputError
from models.strip_ops import strip_triton

logger = logging.getLogger("strip_mlp")

# Inductor's defaults write a normalised map to memory because two kernels read it; computing it twice moves less.
# tools/roofline.py --compiled counts the difference. The layout is already chosen: the network is channels last.
OPTIONS = {
    "realize_opcount_threshold": 300,
    "realize_reads_threshold": 20,
    "realize_acc_reads_threshold": 40,
    "layout_optimization": False,
}
EARLY = {"force_non_lazy_backward_lowering": True}  # PyTorch 2.11 has it, 2.8 does not
if not hasattr(torch._functorch.config, "force_non_lazy_backward_lowering"):
    EARLY = {}


def take_maps_as_they_lie() -> None:
    """Keeps the compiler from copying the maps for a convolution's backward pass; holds for the whole process.

    PyTorch 2.14 copies a depthwise convolution's maps into the memory layout of its weight's gradient, which has one
    channel and so fits any layout. PyTorch 2.11 and older versions do not copy.
    """
    if torch.__version__ < (2, 12):
        return
    from torch._inductor.lowering import fallback_handler, lowerings  # takes a second

    backward = torch.ops.aten.convolution_backward.default
    lowerings[backward] = fallback_handler(backward)


def compile_network(model: nn.Module, setting: str, device: torch.device, deterministic: bool = False) -> nn.Module:
    """The network for the training loop: compiled at its first batch, or ``model`` itself.

    The compiled code is cached in ~/.cache/strip_mlp, or in TORCHINDUCTOR_CACHE_DIR if it is set, so that a resumed run
    finds it. ``model`` itself is not changed: evaluation and checkpoints use it.

    Args:
        setting: COMPILE of the config. ``"auto"``: on CUDA GPUs of compute capability 7.0 or later with Triton, unless
            ``deterministic``, and if PyTorch compiles the backward pass with the forward pass (2.11 does, 2.8 does
            not); if the compiler fails, training continues without it. ``"on"``: such a failure is an error.
            ``"off"``.

    Raises:
        InputError: ``"on"`` with gradient checkpointing, where PyTorch then counts BatchNorm's batches twice.
    """
    if setting == "off" or setting == "auto" and (deterministic or not _can_compile(device)):
        return model
    problem = ""
    if getattr(model, "grad_checkpointing", False) and torch.__version__ < (2, 11):
        problem = f"PyTorch {torch.__version__} counts BatchNorm's batches twice in a compiled, checkpointed network"
        if setting == "on":
            raise InputError(f"{problem}; use --compile off, or leave out --use-checkpoint")
    elif setting == "auto" and not EARLY:
        problem = (f"if the backward pass fails to compile, PyTorch {torch.__version__} cannot fall back; --compile on "
                   "compiles the network all the same")
    if problem:
        logger.info(f"not compiling the network: {problem}")
        return model
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strip_mlp"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    logger.info(f"compiling the network at the first batch, which takes minutes the first time (COMPILE {setting}); "
                f"results are kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']}")
    return CompiledNetwork(model, may_fail=setting == "auto")


def _can_compile(device: torch.device) -> bool:
    is_recent = device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) >= (7, 0))
    return is_recent and strip_triton is not None  # None without Triton, which compiled code needs


class CompiledNetwork(nn.Module):
    """A network whose forward and backward passes are compiled, or the network itself if that fails."""

    def __init__(self, network: nn.Module, may_fail: bool):
        super().__init__()
        self.network = network
        self.may_fail = may_fail
        take_maps_as_they_lie()
        self.run = torch.compile(network.forward, options=OPTIONS)

    def forward(self, x):
        """(N, C, H, W) -> (N, num_classes)"""
        try:
            # The backward pass is compiled with the forward pass, so that it fails before anything has run.
            with torch._functorch.config.patch(EARLY):
                return self.run(x)
        except TorchDynamoException as error:
            if not self.may_fail:
                raise
            reason = next(iter(str(error).splitlines()), "")
            logger.warning(f"THE NETWORK COULD NOT BE COMPILED ({type(error).__name__}: {reason}); training continues "
                           "without torch.compile, more slowly. Use --compile off to skip compiling, or --compile on "
                           "to see the whole error")
            self.run = self.network
            return self.run(x)
