"""All measurements on a GPU, the most valuable first, in eight minutes.

    python tools/bench/gpu_day.py --data-path DIR      # DIR holds CIFAR-10, for the epoch through main.py

In order: the tests that need CUDA, while another process compiles what is timed later; training and inference of T*
against the published formulation and ConvNeXt-T; an epoch of CIFAR-10 at 224; then T, B, and the slowest kernels. A
part that fails or takes too long does not stop the others. OUTPUT/report.md, a section for docs/benchmarks.md, is
written after each part, with what a stopped part had measured; beside it are each part's JSON and log.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import InputError, one_line_errors, write_text


class Part(NamedTuple):
    """A command, after ``python``, and the most seconds that it may take."""

    words: str
    limit: int


TIMED = "published:strip_mlp_tiny_light compiled:strip_mlp_tiny_light strip_mlp_tiny_light compiled:convnext_tiny"
BENCHMARK = "tools/bench/benchmark.py --json {json}"
OTHERS = "published:strip_mlp_tiny compiled:strip_mlp_tiny published:strip_mlp_base compiled:strip_mlp_base"
EPOCH = ("main.py --cfg configs/smlp_tiny_light_alpha3_patch4_224_cifar10.yaml --tag {tag} --output {output} "
         "--data-path {data} --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0")
OPTIONS = f"{BENCHMARK} compiled:strip_mlp_tiny_light --modes training --turns 3 --compile-options"
WARM_UP = Part(f"{BENCHMARK} {TIMED} --turns 1", 130)
PARTS = {
    "tests": Part("-m pytest -m cuda -q -p no:cacheprovider", 110),
    "training": Part(f"{BENCHMARK} {TIMED} --modes training --turns 3", 55),
    "inference": Part(f"{BENCHMARK} {TIMED} --modes inference --turns 3", 35),
    "cifar10": Part(EPOCH, 90),
    "CUDA graphs": Part(f"{OPTIONS} triton.cudagraphs=True", 45),
    "no combined kernels": Part(f"{OPTIONS} combo_kernels=False", 40),
    "other networks": Part(f"{BENCHMARK} {OTHERS} --modes training --turns 3", 50),
    "kernels": Part(f"{BENCHMARK} compiled:strip_mlp_tiny_light --modes training --turns 1 --profile", 35),
}

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("--data-path", default="data/cifar10", metavar="DIR",
                    help="CIFAR-10's folder, downloaded if missing; default: data/cifar10")
PARSER.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                    help=f"default: all, which are {', '.join(map(repr, PARTS))}")
PARSER.add_argument("--minutes", type=float, default=8, metavar="M", help="for everything; default: 8")
PARSER.add_argument("--output", default="output/gpu", metavar="DIR", help="default: output/gpu")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import torch

from logger import describe_environment
from tools.bench.benchmark import report


class Running:
    """A part that runs in a process of its own, with its log and its JSON in a folder."""

    def __init__(self, name: str, part: Part, folder: Path, data_path: str):
        self.name, self.part, self.started = name, part, time.monotonic()
        self.json = folder / f"{name.replace(' ', '_')}.json"
        self.json.unlink(missing_ok=True)
        values = {"json": self.json, "tag": f"{time.time():.0f}", "output": folder, "data": data_path}
        command = [sys.executable, *(word.format(**values) for word in part.words.split())]
        with open(self.json.with_suffix(".log"), "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def finish(self, limit: float) -> tuple[bool, str]:
        """Waits; returns whether it succeeded, and what it measured in Markdown, or the end of its output."""
        try:
            status = self.process.wait(timeout=limit)
            ended = "finished" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # including the processes that it started
            status = self.process.wait()
            ended = f"stopped after {limit:.0f} seconds"
        if self.json.is_file():
            found = report(json.loads(self.json.read_text()))
        else:
            log = self.json.with_suffix(".log").read_text(errors="replace").splitlines()
            found = "\n".join(["```", *log[-30:], "```"])
        print(f"{self.name}: {ended}", flush=True)
        return status == 0, (f"## {self.name.capitalize()}\n\n`python {self.part.words}`: {ended}, "
                             f"{time.monotonic() - self.started:.0f} s\n\n{found}\n")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures; returns 0, or 1 if a part did not finish."""
    args = PARSER.parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA GPU here; on a CPU, use tools/bench/benchmark.py")
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    environment = describe_environment(torch.device("cuda"))
    sections = [f"# Measured on {environment['device']}\n\n{json.dumps(environment)}\n"]
    succeeded = []
    warm_up = Running("warm up", WARM_UP, folder, args.data_path)
    for name in args.parts:
        if name != "tests" and warm_up:  # nothing is timed while it runs
            succeeded.append(warm_up.finish(max(1, WARM_UP.limit - (time.monotonic() - warm_up.started)))[0])
            warm_up = None
        left = end - time.monotonic()
        if left < 5:
            succeeded.append(False)
            break
        is_good, section = Running(name, PARTS[name], folder, args.data_path).finish(min(PARTS[name].limit, left))
        succeeded.append(is_good)
        sections.append(section)
        write_text(folder / "report.md", "\n".join(sections))  # after each part, in case the machine stops
    if warm_up:
        warm_up.finish(1)
    print(f"written to {folder}/report.md")
    return 0 if all(succeeded) else 1


if __name__ == "__main__":
    sys.exit(main())
