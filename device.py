"""Where a run computes: the device, its precision, and whether Triton's kernels work there."""

import copy
import logging
import os
import re
import subprocess
from pathlib import Path

import torch
from torch import nn

import distributed
from models import InputError
from models.strip_mlp import Block
from models.strip_ops import allows_tf32, strip_mix, strip_mix_plain, strip_triton

logger = logging.getLogger("strip_mlp")

_OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}  # NVIDIA's, for each CUDA major version; newer ones run all of these
_BUILDS = "https://pytorch.org/get-started/locally lists the builds"
_GPU_FILE = Path("/dev/nvidia0")
_TENSOR_CORES = (8, 0)  # the lowest compute capability with bf16 products, and with tensor cores in Triton


# ---- the device ----------------------------------------------------------------------------------

def choose_device(name: str = "", index: int = 0) -> torch.device:
    """The device of this process.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"mps"`` or another that ``torch.accelerator`` reports; if empty, a CUDA GPU if
            there is one, else the CPU.
        index: which of several CUDA GPUs.

    Raises:
        InputError: there is no such device; PyTorch cannot use the machine's NVIDIA GPU and ``name`` is not ``"cpu"``.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name in ("", "cuda") and torch.cuda.is_available():
        if index >= torch.cuda.device_count():
            raise InputError(f"process {index} of this machine has no GPU: {torch.cuda.device_count()} found; lower "
                             "--nproc_per_node")
        _check_machine_code(index)
        return torch.device("cuda", index)
    if name in ("", "cuda"):
        _check_unused_gpu()
    accelerator = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""
    if name in ("", accelerator):
        if not name and accelerator:
            logger.info(f"running on the CPU; --device {accelerator} selects this machine's accelerator, on which this "
                        "code has not been tested")
        return torch.device(name or "cpu")
    raise InputError(f"--device {name}: PyTorch {torch.__version__} finds no such device here; it finds "
                     f"{' and '.join(filter(None, ['cpu', accelerator]))}")


def _check_machine_code(index: int) -> None:
    """Raises InputError if this build of PyTorch has no code for the GPU, so that every operation would fail."""
    if torch.version.hip:
        return
    major, minor = torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    for kind, digits in (re.match(r"(sm|compute)_(\d+)", name).groups() for name in built_for):
        version = divmod(int(digits), 10)
        # Machine code runs on later GPUs of its generation; PTX, named "compute", on all later GPUs.
        if version <= (major, minor) and (kind == "compute" or version[0] == major):
            return
    raise InputError(
        f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, for which PyTorch "
        f"{torch.__version__} has no code (only {', '.join(built_for)}); install a build for another CUDA version "
        f"({_BUILDS}; CUDA 12.6 covers 5.0 to 9.0), or use --device cpu"
    )


def _check_unused_gpu() -> None:
    """Raises InputError if there is an NVIDIA GPU that is not hidden and that PyTorch cannot use."""
    found = _find_nvidia_gpu()
    if not found or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    gpu, driver = found
    built_for = torch.version.cuda
    if not built_for:
        advice = f"it is built without CUDA. Install a CUDA build ({_BUILDS})"
    else:
        oldest = _OLDEST_DRIVERS.get(int(built_for.split(".")[0]))
        advice = f"it is built for CUDA {built_for}. "
        if oldest and driver.split(".")[0].isdecimal() and int(driver.split(".")[0]) < oldest:
            advice += (f"That needs driver {oldest} or newer: update the driver, or install a build for an older CUDA "
                       f"({_BUILDS}; driver {_OLDEST_DRIVERS[12]} runs CUDA 12)")
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            advice += f"CUDA does not start: {_cuda_error()}. " + (
                f"CUDA_VISIBLE_DEVICES is {visible!r}: check that nvidia-smi lists this GPU, or unset the variable"
                if visible else "Check that nvidia-smi works here")
    raise InputError(f"this machine has an NVIDIA GPU ({gpu}, driver {driver}), but PyTorch {torch.__version__} cannot "
                     f"use it; {advice}, or insist on the CPU with --device cpu")


def _find_nvidia_gpu() -> tuple[str, str] | None:
    """Name and driver version of the machine's first NVIDIA GPU, whether or not PyTorch can use it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
        name, _, driver = listed[0].rpartition(", ")
        return name, driver
    except (OSError, subprocess.SubprocessError, IndexError):
        if not _GPU_FILE.exists():
            return None
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"Module\D*(\d[\d.]*)", version.read_text()) if version.is_file() else None
    return "nvidia-smi fails", match[1] if match else "unknown"


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "PyTorch finds no GPU"


# ---- the precision -------------------------------------------------------------------------------

def choose_precision(device: torch.device) -> tuple[str, str]:
    """``"bf16"``, ``"fp16"`` or ``"fp32"`` for the forward pass, and why."""
    if device.type == "cpu":
        return "fp32", "lower precision is not faster on a CPU"
    if device.type != "cuda":
        return "fp32", f"16-bit precision has not been tested on {device.type}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip or capability >= _TENSOR_CORES:
        return "bf16", f"{name} supports it"
    version = ".".join(map(str, capability))
    if capability >= (7, 0):
        return "fp16", f"{name}, compute capability {version}, has no bf16; gradients are scaled"
    return "fp32", f"{name}, compute capability {version}, has no tensor cores"


# ---- the form of the strip layers ----------------------------------------------------------------

def settle_form(config, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Makes the network compute without Triton's kernels on all processes if they do not work on one of them.

    Runs the kernels once, and only where FORM auto or triton would use them: on CUDA.

    Args:
        config: the run's config; MODEL.STRIP_MLP.FORM says who chooses the form.
        model: the network; its modules with a ``form`` have kernels.
        device: the device of the network.
        dtype: of the forward pass.

    Raises:
        InputError: FORM is triton and the kernels do not work.
    """
    form = config.MODEL.STRIP_MLP.FORM
    layers = [module for module in model.modules() if hasattr(module, "form")]
    if device.type != "cuda" or form not in ("auto", "triton") or not layers:
        return
    if form == "auto" and dtype == torch.float32 and not allows_tf32():
        return
    reasons = distributed.gather_objects(why_not_triton(device, dtype))
    rank, reason = next(((rank, reason) for rank, reason in enumerate(reasons) if reason), (0, ""))
    if not reason:
        return
    failure = f"Triton's kernels do not work{f' on rank {rank}' if len(reasons) > 1 else ''}: {reason}"
    if form == "triton":
        raise InputError(f"MODEL.STRIP_MLP.FORM is triton, but {failure}; set it to auto")
    logger.warning(f"the strip layers use matrix products, which are slower: {failure}")
    for layer in layers:
        layer.form = "matmul"


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Runs the kernels once, forward and backward; empty if they agree with the formula on the CPU, else the reason."""
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < _TENSOR_CORES:
        version = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability {version} is below 8.0, where they would run without tensor cores"
    if strip_triton is None:
        return "the package triton, which comes with PyTorch's CUDA builds, is not installed"
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 6, 5), (2, 5, 5, 3), (2, 5)  # x, weight, bias; no network has this size to be tuned by it
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    grad = torch.randn(shapes[0], generator=generator)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2  # of 16 bits; TF32 is rounded to 10
    expected = _results(strip_mix_plain, [t.double() for t in tensors], grad.double())
    try:
        with strip_triton.smallest_blocks():
            found = _results(lambda *args: strip_mix(*args, "triton"), [t.to(device) for t in tensors],
                             grad.to(device), dtype)
        for name, value, reference in zip(("result", "gradient of x", "of the weight", "of the bias"), found, expected,
                                          strict=True):
            error = float((value.cpu().double() - reference).norm() / reference.norm())
            if not error < tolerance:
                return f"their {name} differs from the formula's by {error:.1e} (relative)"
        with strip_triton.smallest_blocks():
            of_blocks = [_error_of_block(size, device, dtype) for size in ((6, 5), (2, 3))]  # many and few tokens
    except Exception as error:  # compiler, driver and file system all fail in their own ways
        advice = "; TRITON_CACHE_DIR sets the folder for compiled kernels" if isinstance(error, OSError) else ""
        return f"{type(error).__name__}: {_first_line(error)}{advice}"
    if not max(of_blocks) < 5 * tolerance:  # a dozen layers deep
        return f"a block's results or gradients differ from the formulas' by {max(of_blocks):.1e} (relative)"
    return ""


def _error_of_block(size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a block's result, gradients and running statistics with the kernels."""
    generator = torch.Generator().manual_seed(0)
    block = Block(4, size, num_patches=1, strip_width=3, mlp_ratio=3.0, drop_path=0.0)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    x, grad = (torch.randn(8, 4, *size, generator=generator) for _ in range(2))
    results = []
    for form, where, of in (("triton", device, torch.float32), ("plain", torch.device("cpu"), torch.float64)):
        net = copy.deepcopy(block).to(where, of, memory_format=torch.channels_last)
        for module in net.modules():
            if hasattr(module, "form"):
                module.form = form
        images = x.to(where, of, memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(where.type, dtype, enabled=form == "triton" and dtype != torch.float32):
            y = net(images.to(dtype) if form == "triton" else images)
        gradients = torch.autograd.grad(y, [images, *net.parameters()], grad.to(where, y.dtype))
        groups = ([y], gradients[:1], gradients[1:], [b for b in net.buffers() if b.is_floating_point()])
        results.append([torch.cat([t.detach().flatten().cpu().double() for t in group]) for group in groups])
    return max(float((value - reference).norm() / reference.norm()) for value, reference in zip(*results, strict=True))


def _results(mix, tensors, grad, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    x, *parameters = (t.requires_grad_() for t in tensors)
    y = mix(x.to(dtype or x.dtype), *parameters, "row")
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), grad.to(y.dtype))]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
