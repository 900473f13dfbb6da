"""Times training and inference steps of networks, in turn in one process.

    python tools/bench/benchmark.py                                                   # on this machine's device
    python tools/bench/benchmark.py published:strip_mlp_base compiled:strip_mlp_base --modes training
    OMP_NUM_THREADS=1 python tools/bench/benchmark.py --table cifar10_cpu --modes training --batch-size 128

Prints Markdown: the ratios are to the first network, the median of the ratios within the turns. On the CPU with one
thread, seconds are CPU time, which other programs disturb least. The JSON file holds every time and is written after
each of them.
"""

import json
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import InputError, one_line_errors, write_text

NETWORKS = ["published:strip_mlp_tiny_light", "strip_mlp_tiny_light", "convnext_tiny"]

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK",
                    help="[compiled:][published:]NAME: a timm model or a config file; compiled: by torch.compile; "
                         f"published: computed as the authors' code does; default: {' '.join(NETWORKS)}")
PARSER.add_argument("--table", metavar="TABLE", help="instead, the networks of a table of tools/tables.yaml")
PARSER.add_argument("--modes", nargs="+", choices=["inference", "training"], default=["inference", "training"],
                    help="default: both")
PARSER.add_argument("--dtype", choices=["bf16", "fp16", "fp32", "auto"], default="auto",
                    help="default: auto, as main.py chooses")
PARSER.add_argument("--batch-size", type=int, metavar="N", help="default: 128 on a GPU, 8 on a CPU")
PARSER.add_argument("--turns", type=int, default=5, metavar="N", help="times of each network; default: 5")
PARSER.add_argument("--device", default="", metavar="TYPE", help="default: cuda where there is a GPU, else cpu")
PARSER.add_argument("--depthwise", choices=["cudnn", "native"],
                    help="whose kernels compute depthwise convolutions on CUDA; default: PyTorch's choice")
PARSER.add_argument("--compile-options", nargs="+", default=[], metavar="KEY=VALUE",
                    help="change main.py's options of torch.compile (engine.OPTIONS), such as triton.cudagraphs=True")
PARSER.add_argument("--profile", action="store_true",
                    help="also list the kernels, on a CPU the operations, that take longest")
PARSER.add_argument("--json", type=Path, default="output/benchmark.json", metavar="FILE",
                    help="file for all times; default: output/benchmark.json")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import datetime
import gc
import time
from functools import partial

import torch
from torch.utils.benchmark import Timer

from distributed import choose_device
from engine import CompiledNetwork, Precision
from inference import build_network
from logger import describe_environment
from tools.bench.networks import Named, build_named, set_compile_options
from tools.tables import Row, choose, read_tables


class Case:
    """A network in one mode, training (forward, loss, backward and AdamW) or inference: its step, and the seconds of
    each turn."""

    def __init__(self, named: Named, mode: str, precision: Precision, batch_size: int, device: torch.device):
        layout = torch.contiguous_format if named.is_published else torch.channels_last
        self.network = named.network.to(device, memory_format=layout).train(mode == "training")
        images = torch.randn(batch_size, 3, named.img_size, named.img_size, device=device)
        self.images = images.contiguous(memory_format=layout)
        self.targets = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.run = CompiledNetwork(self.network, may_fail=False) if named.is_compiled else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), fused=True) if mode == "training" else None
        self.precision, self.scaler = precision, precision.scaler()
        self.device, self.seconds, self.peak_bytes = device, [], 0

    def step(self) -> None:
        """One step of training or inference."""
        if not self.optimizer:
            with torch.no_grad(), self.precision.autocast():
                self.run(self.images)
            return
        with self.precision.autocast():
            loss = torch.nn.functional.cross_entropy(self.run(self.images), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def warm_up(self) -> None:
        """Compiles, chooses algorithms, fills the optimiser; then measures the memory of a step on CUDA."""
        for _ in range(2):
            self.step()
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            self.peak_bytes = torch.cuda.max_memory_allocated() - before

    def time(self) -> None:
        """Adds the seconds of a step: of one on the CPU, the median of several on a GPU."""
        if self.device.type == "cuda":
            self.seconds.append(Timer("step()", globals={"step": self.step}).blocked_autorange(min_run_time=0.2).median)
            return
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        self.step()
        self.seconds.append(clock() - start)

    def kernels(self) -> str:
        """The kernels, or operations on a CPU, that take longest in a step, as a table."""
        kind = self.device.type
        with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind.upper())]) as profile:
            self.step()
            if kind == "cuda":
                torch.cuda.synchronize()
        order = f"self_{kind}_time_total"
        return profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)


def report(result: dict) -> str:
    """The times as Markdown."""
    environment, settings = result["environment"], result["settings"]
    lines = [f"{environment['device']}; PyTorch {environment['torch']}, timm {environment['timm']}, Python "
             f"{environment['python']}; commit {environment['git_commit']}; {result['date']}; {settings['threads']} "
             f"CPU threads; {settings['dtype']}, batch {settings['batch_size']}; median of {settings['turns']} turns, "
             "in brackets the spread (largest less smallest, in percent of the median)."]
    for mode, cases in result["cases"].items():
        lines += ["", f"**{mode.capitalize()}**", "", "| network | ms a step | images/s | vs the first | peak memory |",
                  "|---|---|---|---|---|"]
        first = next(iter(cases.values()))["seconds"]
        for name, case in cases.items():
            seconds = case["seconds"]
            if not seconds:
                lines.append(f"| {name} | {case.get('failed', 'not measured')} | | | |")
                continue
            median = statistics.median(seconds)
            spread = 100 * (max(seconds) - min(seconds)) / median
            ratio = f"{statistics.median(a / b for a, b in zip(first, seconds, strict=False)):.2f}" if first else ""
            memory = f"{case['peak_bytes'] / 2**30:.2f} GiB" if case["peak_bytes"] else ""
            lines.append(f"| {name} | {1e3 * median:.2f} ({spread:.0f} %) | {settings['batch_size'] / median:.1f} | "
                         f"{ratio} | {memory} |")
        lines += [f"\n```\n{case['kernels']}\n```" for case in cases.values() if "kernels" in case]
    return "\n".join(lines)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures, prints Markdown, writes JSON."""
    args = PARSER.parse_args(argv)
    if min(args.turns, args.batch_size or 1) < 1:
        raise InputError("--turns and --batch-size must be at least 1")
    device = choose_device(args.device)
    precision = Precision(args.dtype, device)
    batch_size = args.batch_size or (128 if device.type == "cuda" else 8)
    torch.backends.cudnn.benchmark = True
    if args.depthwise:
        if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
            raise InputError(f"--depthwise: PyTorch {torch.__version__} has no such choice; 2.14 has it")
        torch.backends.cudnn.depthwise_kernel = args.depthwise
    set_compile_options(args.compile_options)
    networks = {name: partial(build_named, name) for name in args.networks}
    if args.table:
        tables = read_tables()
        (table,) = choose([args.table], tables, "table")
        networks = {row.name: partial(build_row, row) for row in tables[table][1]}
    result = {
        "date": datetime.date.today().isoformat(), "environment": describe_environment(device),
        "settings": {"batch_size": batch_size, "dtype": precision.name, "turns": args.turns,
                     "threads": torch.get_num_threads(), "depthwise": args.depthwise or "auto",
                     "compile_options": args.compile_options},
        "cases": {},
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_text(args.json, json.dumps(result, indent=1) + "\n")

    for mode in args.modes:  # inference first by default: a process that has trained holds memory that helps it
        cases, results = {}, result["cases"].setdefault(mode, {})
        for name, build in networks.items():
            print(f"{mode}: {name}", file=sys.stderr, flush=True)
            torch.manual_seed(0)
            named = build()
            try:
                case = Case(named, mode, precision, batch_size, device)
                case.warm_up()
                cases[name], results[name] = case, {"seconds": case.seconds, "peak_bytes": case.peak_bytes}
            except RuntimeError as error:  # mostly out of memory; the other networks are still measured
                results[name] = {"seconds": [], "failed": str(error).splitlines()[0]}
            save()
        for _ in range(args.turns):
            for case in cases.values():
                case.time()
                save()
        for name, case in cases.items() if args.profile else ():
            results[name]["kernels"] = case.kernels()
            save()
        cases.clear()
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(report(result))
    return 0


def build_row(row: Row) -> Named:
    """The network of a table's row."""
    config = row.config()
    return Named(build_network(config), config.DATA.IMG_SIZE)


if __name__ == "__main__":
    sys.exit(main())
