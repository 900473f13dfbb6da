"""What bounds a training or inference step on a GPU, counted without one: bytes, operations, launches, memory.

    python tools/roofline.py --cfg configs/smlp_tiny_light_alpha3_patch4_224_imagenet1k.yaml
    python tools/roofline.py --model convnext_tiny --compiled --json output/convnext_tiny.json
    python tools/roofline.py --model strip_mlp_tiny_light --measured        # on a GPU: beside what each operation takes

Prints the step's traffic by operation and by module, and the time that GPUs could not beat. Only the network and its
loss are counted, neither the optimiser nor the input pipeline. ``--compiled`` takes one to three minutes.
``--measured`` runs the step and times every operation, beside the time that it cannot beat at the bandwidth and the
arithmetic rate that this device reached just before.
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch

import inference
from config import load_config, nearest
from logger import describe_environment
from models import StripMLPNet
from tools.lib.operator_times import measure_device
from tools.lib.published import published_formulation
from tools.lib.traffic import Traffic, count_step, floor
from tools.lib.traffic_compiled import count_compiled_step
from tools.lib.traffic_measured import time_step
from utils import InputError, one_line_errors

# Data sheets: GB/s of memory, TFLOP/s of dense products in 16 bits summed in 32.
GPUS = {
    "RTX 3090": (936, 71), "RTX 4090": (1008, 165), "L40S": (864, 362), "A100 SXM 80 GB": (2039, 312),
    "H100 SXM": (3350, 989), "H200": (4800, 989), "B200": (8000, 2250), "MI300X": (5300, 1307),
}


def build_network(args) -> tuple[torch.nn.Module, int]:
    """The network that the command line asks for and the side of its images.

    Raises:
        InputError: there is no such network, or it has no such form.
    """
    if args.cfg:
        config = load_config(args.cfg, args.opts)
        network, side = inference.build_network(config), config.DATA.IMG_SIZE
    else:
        if not timm.is_model(args.model):
            raise InputError(f"--model {args.model!r} is not a timm model{nearest(args.model, timm.list_models())}")
        network = timm.create_model(args.model, drop_path_rate=0.1)
        side = network.pretrained_cfg["input_size"][-1]
    if args.form == "fused" and not hasattr(network, "fuse"):
        raise InputError(f"--form fused: {args.model or args.cfg} has no inference form; use --form ours")
    if args.form == "published" and not isinstance(network, StripMLPNet):
        raise InputError(f"--form published: {args.model or args.cfg} is no Strip-MLP; use --form ours")
    if args.form == "published":
        network = published_formulation(network)
    else:
        if args.form == "fused":
            network.fuse()
        for module in network.modules() if not args.measured else ():
            if getattr(module, "form", "") == "auto":
                module.form = "triton"  # what auto means on a GPU
        network.to(memory_format=torch.channels_last)
    return network.train(args.mode == "training"), side


def report(traffic: Traffic, images: int, rows: int) -> str:
    """A step's traffic as Markdown."""
    phases = [phase for phase in ("forward", "backward") if traffic.total("launches", phase)]
    lines = ["| | MB an image | GFLOP an image | launches |", "|---|---|---|---|"]
    for phase in (*phases, None):
        moved, flops = (traffic.total(what, phase) / images for what in ("bytes", "flops"))
        lines.append(f"| {phase or 'step'} | {moved / 1e6:.1f} | {flops / 1e9:.2f} | "
                     f"{traffic.total('launches', phase)} |")
    if traffic.peak_bytes:
        lines += ["", f"Peak of activations and gradients: {traffic.peak_bytes / 2**30:.2f} GiB."]
    for title, of in (("operation", lambda op: f"{op.name}, {op.phase}"), ("module", _kind_of_module)):
        sums = defaultdict(lambda: [0, 0])
        for op in traffic.operations:
            sums[of(op)][0] += op.bytes
            sums[of(op)][1] += op.launches
        if len(sums) > 1:
            lines += ["", f"| {title} | MB an image | launches |", "|---|---|---|"]
            largest = sorted(sums.items(), key=lambda item: -item[1][0])[:rows]
            lines += [f"| {name} | {moved / images / 1e6:.1f} | {launches} |" for name, (moved, launches) in largest]
    lines += ["", "| GPU | GB/s | TFLOP/s | ms a step at least | images/s at most |", "|---|---|---|---|---|"]
    for name, (bandwidth, flops) in GPUS.items():
        seconds = traffic.seconds(1e9 * bandwidth, 1e12 * flops)
        lines.append(f"| {name} | {bandwidth} | {flops} | {1e3 * seconds:.2f} | {images / seconds:.0f} |")
    return "\n".join(lines)


def report_measured(traffic: Traffic, device: dict, rows: int) -> str:
    """What each kind of operation takes, beside the time that it cannot beat on this device, as Markdown.

    Args:
        traffic: with measured seconds.
        device: as ``measure_device`` returns it.
        rows: how many kinds, those that take longest.
    """
    rates = device["bytes_per_second"], device["flops"]
    sums = defaultdict(lambda: [0, 0.0, 0.0])
    for op in traffic.operations:
        for name in (f"{op.name}, {op.phase}", "**all**"):
            sums[name] = [a + b for a, b in zip(sums[name], (1, floor(op, *rates), op.seconds), strict=True)]
    lines = [f"This device copies {rates[0] / 1e9:.0f} GB/s and multiplies {rates[1] / 1e12:.3g} TFLOP/s.", "",
             "| operation | calls | predicted ms | measured ms | measured / predicted |", "|---|---|---|---|---|"]
    for name, (calls, least, measured) in sorted(sums.items(), key=lambda item: -item[1][2])[:rows + 1]:
        lines.append(f"| {name} | {calls} | {1e3 * least:.3f} | {1e3 * measured:.3f} | {measured / least:.2f} |")
    return "\n".join(lines)


def _kind_of_module(op) -> str:
    """A module's path without the numbers of stage and block, so that all blocks add up."""
    return ".".join(part for part in op.module.split(".") if not part.isdigit()) or "(network)"


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Counts and prints Markdown; with ``--json`` writes every operation."""
    args = parse_arguments(argv)
    torch.manual_seed(0)
    network, side = build_network(args)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[args.dtype]
    shape, training = (args.batch_size, 3, side, side), args.mode == "training"
    command = "python tools/roofline.py " + " ".join(sys.argv[1:] if argv is None else argv)
    result = {"command": command}
    if args.measured:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        layout = torch.contiguous_format if args.form == "published" else torch.channels_last
        images = torch.randn(shape, device=device).contiguous(memory_format=layout)
        traffic = time_step(network.to(device), images, training, dtype)
        result |= {"environment": describe_environment(device),
                   "device": measure_device(device, dtype or torch.float32)}
        text = report_measured(traffic, result["device"], args.rows)
    else:
        count = count_compiled_step if args.compiled else count_step
        traffic = count(network, shape, training, dtype)
        text = report(traffic, args.batch_size, args.rows)
    print(f"# `{command}`\n\n{text}")
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result | asdict(traffic), indent=1) + "\n")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cfg", metavar="FILE", help="a config of this repository")
    which.add_argument("--model", metavar="NAME", help="a name of timm's, such as strip_mlp_tiny or convnext_tiny")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes to the config")
    parser.add_argument("--mode", choices=["training", "inference"], default="training", help="default: training")
    parser.add_argument("--form", choices=["ours", "fused", "published"], default="ours",
                        help="ours: the network that is trained; fused: its inference form; published: the same "
                             "network computed as its authors' code does; default: ours")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compiled", action="store_true", help="as torch.compile would fuse it, not eager")
    how.add_argument("--measured", action="store_true", help="run the step eagerly and time every operation")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="default: bf16")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images; default: 128")
    parser.add_argument("--rows", type=int, default=15, metavar="N", help="rows of each table; default: 15")
    parser.add_argument("--json", metavar="FILE", help="where to write every operation")
    args = parser.parse_args(argv)
    if args.opts and not args.cfg:
        parser.error("--opts changes a config; give --cfg")
    if args.form == "fused" and args.mode == "training":
        parser.error("--form fused is for inference; give --mode inference")
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}; it must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
