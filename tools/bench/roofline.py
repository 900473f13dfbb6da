"""What bounds a training or inference step on a GPU, counted without one: bytes, operations, launches, memory.

    python tools/bench/roofline.py strip_mlp_tiny_light
    python tools/bench/roofline.py compiled:convnext_tiny --mode inference

Prints the step's traffic by operation, and the time that GPUs cannot beat. Only the network and its loss are counted,
neither the optimiser nor the input pipeline. Counting a compiled network takes one to three minutes.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import InputError, one_line_errors

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("network", metavar="NETWORK",
                    help="[compiled:][published:]NAME: a timm model or a config file; compiled: as torch.compile "
                         "fuses it; published: as the authors' code computes it")
PARSER.add_argument("--mode", choices=["training", "inference"], default="training", help="default: training")
PARSER.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="default: bf16")
PARSER.add_argument("--compile-options", nargs="+", default=[], metavar="KEY=VALUE",
                    help="change main.py's options of torch.compile (engine.OPTIONS), such as triton.cudagraphs=True")
PARSER.add_argument("--batch-size", type=int, default=128, metavar="N", help="images; default: 128")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import torch

from engine import Precision
from tools.bench.networks import build_named, set_compile_options
from tools.bench.traffic import Traffic, count_compiled_step, count_step

# Data sheets: GB/s of memory, TFLOP/s of dense products in 16 bits summed in 32.
GPUS = {
    "RTX 3090": (936, 71), "RTX 4090": (1008, 165), "L40S": (864, 362), "A100 SXM 80 GB": (2039, 312),
    "H100 SXM": (3350, 989), "H200": (4800, 989), "B200": (8000, 2250), "MI300X": (5300, 1307),
}


def report(traffic: Traffic, images: int) -> str:
    """A step's traffic as Markdown."""
    lines = ["| | MB an image | GFLOP an image | launches |", "|---|---|---|---|"]
    for phase in ("forward", "backward", None):
        moved, flops = (traffic.total(what, phase) / images for what in ("bytes", "flops"))
        if moved:
            launches = traffic.total("launches", phase)
            gflop = f"{flops / 1e9:.2f}" if flops else "not counted"
            lines.append(f"| {phase or 'step'} | {moved / 1e6:.1f} | {gflop} | {launches} |")
    if traffic.peak_bytes:
        lines += ["", f"Peak of activations and gradients: {traffic.peak_bytes / 2**30:.2f} GiB."]
    moved, launches = Counter(), Counter()
    for op in traffic.operations:
        name = f"{op.name}, {op.phase}"
        moved[name] += op.bytes
        launches[name] += op.launches
    lines += ["", "| operation | MB an image | launches |", "|---|---|---|"]
    lines += [f"| {name} | {size / images / 1e6:.1f} | {launches[name]} |" for name, size in moved.most_common(15)]
    lines += ["", "| GPU | GB/s | TFLOP/s | ms a step at least | images/s at most |", "|---|---|---|---|---|"]
    for name, (bandwidth, flops) in GPUS.items():
        seconds = traffic.seconds(1e9 * bandwidth, 1e12 * flops)
        lines.append(f"| {name} | {bandwidth} | {flops} | {1e3 * seconds:.2f} | {images / seconds:.0f} |")
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Counts and prints Markdown."""
    args = PARSER.parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; it must be at least 1")
    set_compile_options(args.compile_options)
    torch.manual_seed(0)
    named = build_named(args.network)
    dtype = Precision.DTYPES[args.dtype] if args.dtype != "fp32" else None
    if not named.is_published:
        named.network.to(memory_format=torch.channels_last)
    count = count_compiled_step if named.is_compiled else count_step
    training = args.mode == "training"
    shape = (args.batch_size, 3, named.img_size, named.img_size)
    print(report(count(named.network.train(training), shape, training, dtype), args.batch_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
