"""Measures how fast Strip-MLP is: networks, the strip operator alone, and the input pipeline.

    python tools/benchmark.py                                        # all of it, on this machine's device
    python tools/benchmark.py --parts networks --models strip_mlp_tiny --modes training --dtypes bf16
    python tools/benchmark.py --device cpu --json docs/benchmarks/cpu.json

Networks are measured in one process, in turn: this project's Strip-MLP, its inference form, the published formulation
(``published.py``) and timm models of the same accuracy. The tool prints Markdown; the JSON file holds the time of every
turn.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from engine import Precision
from logger import describe_environment
from models.strip_mlp import VARIANTS
from tools.lib.network_times import Case, groups_of_cases, measure_groups, multiplication, speed_up
from tools.lib.operator_times import measure_device, measure_operator
from tools.lib.pipeline_times import measure_pipeline
from utils import InputError, one_line_errors

PARTS = ["networks", "operator", "pipeline"]
PEERS = ["convnext_tiny", "swin_tiny_patch4_window7_224", "resnet50"]


def report(result: dict) -> str:
    """The measurements as Markdown tables."""
    environment, settings = result["environment"], result["settings"]
    lines = [
        f"{environment['device']}; PyTorch {environment['torch']}, timm {environment['timm']}, Python "
        f"{environment['python']}; commit {environment['git_commit']}; {result['date']}; {settings['threads']} CPU "
        f"threads; batch {settings['batch_size']} at {settings['img_size']}x{settings['img_size']}; median of "
        f"{settings['repeats']} repeats, in brackets the spread (largest less smallest, in percent of the median).",
    ]
    for mode in ("training", "inference"):
        rows = [Case(**case) for case in result["cases"] if case["mode"] == mode]
        if rows:
            lines += ["", f"**{mode.capitalize()}**", "", "| network | form | precision | images/s | vs published | "
                      "peak memory |", "|---|---|---|---|---|---|"]
        for case in rows:
            baseline = [other for other in rows if (other.model, other.dtype, other.form, other.compiled) == (
                case.model, case.dtype, "published", False)]
            ratio = f"{speed_up(case, baseline[0]):.2f}" if baseline else ""
            spread = 100 * (max(case.seconds) - min(case.seconds)) / statistics.median(case.seconds)
            memory = f"{case.peak_bytes / 2**30:.2f} GiB" if case.peak_bytes else ""
            lines.append(f"| {case.model} | {case.form}{', compiled' * case.compiled} | {case.dtype} | "
                         f"{case.images_per_second:.1f} ({spread:.0f} %) | {ratio} | {memory} |")
    if result["operator"]:
        copy, flops = result["device"]["bytes_per_second"], result["device"]["flops"]
        lines += ["", f"**The strip operator alone**, {settings['dtypes'][0]}. This device copies {copy / 1e9:.1f} GB/s"
                  f" and multiplies {flops / 1e12:.3f} TFLOP/s in the same run.", "",
                  "| stage (N, C, H, W) | axis | form | forward | forward + backward | GB/s, of copy | TFLOP/s |",
                  "|---|---|---|---|---|---|---|"]
        for row in result["operator"]:
            lines.append(f"| {row['stage']} {tuple(row['shape'])} | {row['axis']} | {row['form']} | "
                         f"{1e3 * row['forward_seconds']:.3f} ms | {1e3 * row['forward_backward_seconds']:.3f} ms | "
                         f"{row['bytes_per_second'] / 1e9:.1f}, {100 * row['bytes_per_second'] / copy:.0f} % | "
                         f"{row['flops'] / 1e12:.3f} |")
    if result["pipeline"]:
        pipeline = result["pipeline"]
        lines += ["", f"**Input pipeline**: {pipeline['images_per_second_and_worker']:.1f} images/s and worker (JPEG "
                  f"500x375, ImageNet's augmentation). Training {pipeline['model']} with {pipeline['workers']} workers "
                  f"waits for data {100 * pipeline['share_of_step_waiting']:.0f} % of the time "
                  f"({pipeline['images_per_second']:.1f} images/s)."]
    if result["failed"]:
        lines += ["", "Failed: " + "; ".join(result["failed"]) + "."]
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures, prints Markdown, writes JSON."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    result = {
        "environment": describe_environment(device),
        "date": datetime.date.today().isoformat(),
        "command": "python tools/benchmark.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "settings": {"batch_size": args.batch_size, "img_size": args.img_size, "repeats": args.repeats,
                     "dtypes": args.dtypes, "threads": torch.get_num_threads()},
    }
    result |= {"cases": [], "failed": [], "operator": [], "pipeline": None}
    if "networks" in args.parts:
        result["cases"], result["failed"] = measure_groups(groups_of_cases(args, device), args, device)
    with multiplication(args.dtypes[0]):
        if "operator" in args.parts:
            result["device"] = measure_device(device, Precision.DTYPES.get(args.dtypes[0], torch.float32))
            result["operator"] = measure_operator(args, device)
        if "pipeline" in args.parts:
            result["pipeline"] = measure_pipeline(args, device)
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"# `{result['command'].strip()}`\n\n{report(result)}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; most defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all three")
    parser.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference", "training"],
                        help="modes of the networks; default: both")
    parser.add_argument("--models", nargs="+", choices=list(VARIANTS), metavar="NAME",
                        help="variants to measure; default: tiny_light, tiny and base on a GPU, without tiny on a CPU")
    parser.add_argument("--peers", nargs="*", default=PEERS, metavar="NAME", help="timm models to compare with")
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp16", "tf32", "fp32"],
                        help="precisions; the first is also the operator's; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="measure compiled networks too; default: on a GPU only, since it takes minutes on a CPU")
    parser.add_argument("--batch-size", type=int, metavar="N", help="batch size; default: 128 on a GPU, 8 on a CPU")
    parser.add_argument("--img-size", type=int, default=224, metavar="S", help="side of the images; default: 224")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of each measurement; default: 5")
    parser.add_argument("--json", default="output/benchmark.json", metavar="FILE",
                        help="file for all times; default: output/benchmark.json")
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    args.models = args.models or (
        ["strip_mlp_tiny_light", *["strip_mlp_tiny"] * on_gpu, "strip_mlp_base"])
    args.dtypes = args.dtypes or (["bf16"] if on_gpu else ["fp32"])
    args.compile = on_gpu if args.compile is None else args.compile
    args.batch_size = args.batch_size or (128 if on_gpu else 8)
    return args


if __name__ == "__main__":
    sys.exit(main())
