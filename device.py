"""Whether Triton's kernels work on this process's device."""

import copy
import logging

import torch
from torch import nn

import distributed
from models.strip_mlp import Block
from models.strip_ops import allows_tf32, strip_mix, strip_mix_plain, strip_triton
from utils import InputError

logger = logging.getLogger("strip_mlp")

_TENSOR_CORES = (8, 0)  # the lowest compute capability with tensor cores in Triton


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
