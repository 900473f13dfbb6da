"""Times of the strip operator alone, in every form and on every stage's shape: part ``operator`` of benchmark.py."""

import itertools
import statistics
from functools import partial

import torch

from engine import Precision
from models.strip_mlp import StripMLP
from tools.lib.network_times import seconds_of
from tools.lib.published import GroupedConvolution

STAGES = {"strip_mlp_tiny_light": (80, 2), "strip_mlp_base": (112, 4)}  # embed_dim, P of the operator's shapes


def measure_device(device: torch.device, dtype: torch.dtype) -> dict:
    """The device's rates: bytes/s of a large copy (read and written), FLOP/s of a large matrix product."""
    size = 2**28 if device.type == "cuda" else 2**25
    source = torch.randn(size, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), 0.2) for _ in range(5))
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = min(seconds_of(lambda: a @ b, 0.2) for _ in range(5))
    return {"bytes_per_second": 2 * source.nbytes / copy, "flops": 2 * side**3 / product}


def measure_operator(args, device: torch.device) -> list[dict]:
    """The strip layer alone on each stage's shape, forward, and forward and backward."""
    dtype = Precision.DTYPES.get(args.dtypes[0], torch.float32)
    forms = ["published", "matmul"] + ["triton"] * (device.type == "cuda")
    rows = []
    for (name, (dim, patches)), stage, axis in itertools.product(STAGES.items(), range(4), ("row", "column")):
        channels, side = dim // 2 * 2**stage, args.img_size // 4 // 2**stage
        shape = args.batch_size, 2 * channels, side, side
        # As in the network: the first half of a channels-last map's channels, which the kernels receive as a copy.
        half = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last).chunk(2, dim=1)[0]
        layers = {form: StripMLP(channels, side, patches, axis).to(device, dtype) for form in forms}
        inputs = {form: (half if form == "matmul" else half.contiguous()).detach().requires_grad_() for form in forms}
        for form, layer in layers.items():
            if form == "published":
                layer.__class__ = GroupedConvolution
            layer.form = form
        times = {(form, part): [] for form in forms for part in ("forward", "both")}
        for form, layer in layers.items():
            _forward_backward(layer, inputs[form])  # chooses algorithms, compiles kernels
        for _ in range(args.repeats):
            for form, layer in layers.items():
                with torch.no_grad():
                    times[form, "forward"].append(seconds_of(partial(layer, inputs[form]), 0.02))
                times[form, "both"].append(seconds_of(partial(_forward_backward, layer, inputs[form]), 0.02))
        for form in forms:
            forward, both = (statistics.median(times[form, part]) for part in ("forward", "both"))
            rows.append({
                "shapes_of": name, "stage": stage + 1, "axis": axis, "shape": list(half.shape), "form": form,
                "forward_seconds": forward, "forward_backward_seconds": both,
                "bytes_per_second": 2 * half.nbytes / forward,  # the input once and the output once
                "flops": 2 * half.numel() * 3 * side / forward,
            })
    return rows


def _forward_backward(layer, x) -> None:
    y = layer(x)
    y.backward(y)  # any gradient in the layout of the result
