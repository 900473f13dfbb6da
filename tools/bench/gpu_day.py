"""All measurements on a GPU, the most valuable first, in eight minutes.

    python tools/bench/gpu_day.py --data-path DIR      # DIR holds CIFAR-10, for the epoch through main.py

In order: the tests that need CUDA, while another process compiles what is timed later; training and inference of T*
against the published formulation and ConvNeXt-T; an epoch of CIFAR-10 at 224; then T, B, and the slowest kernels. A
part that fails or takes too long does not stop the others. OUTPUT/report.json and report.md, a section for
docs/benchmarks.md, are written after each part, with what a stopped part had measured.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import InputError, one_line_errors, write_text


@dataclass(frozen=True)
class Part:
    """A command, after ``python``, and the most seconds that it may take."""

    words: str
    limit: int
    writes_json: bool = True  # by --json FILE


TIMED = "published:strip_mlp_tiny_light compiled:strip_mlp_tiny_light strip_mlp_tiny_light compiled:convnext_tiny"
BENCHMARK = "tools/bench/benchmark.py"
EPOCH = ("main.py --cfg configs/smlp_tiny_light_alpha3_patch4_224_cifar10.yaml --tag {tag} --output {output} "
         "--data-path {data} --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0")
WARM_UP = Part(f"{BENCHMARK} {TIMED} --turns 1", 150)
PARTS = {
    "tests": Part("-m pytest -m cuda -q -p no:cacheprovider", 110, writes_json=False),
    "training": Part(f"{BENCHMARK} {TIMED} --modes training --turns 3", 60),
    "inference": Part(f"{BENCHMARK} {TIMED} --modes inference --turns 3", 40),
    "cifar10": Part(EPOCH, 110, writes_json=False),
    "other networks": Part(f"{BENCHMARK} published:strip_mlp_tiny compiled:strip_mlp_tiny published:strip_mlp_base "
                           "compiled:strip_mlp_base --modes training --turns 3", 80),
    "kernels": Part(f"{BENCHMARK} compiled:strip_mlp_tiny_light --modes training --turns 1 --profile", 40),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", default="data/cifar10", metavar="DIR",
                        help="CIFAR-10's folder, downloaded if missing; default: data/cifar10")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"default: all, which are {', '.join(map(repr, PARTS))}")
    parser.add_argument("--minutes", type=float, default=8, metavar="M", help="for everything; default: 8")
    parser.add_argument("--output", default="output/gpu", metavar="DIR", help="default: output/gpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # before the slow imports, so that --help is fast

import torch

from logger import describe_environment
from tools.bench.benchmark import report


def start(name: str, part: Part, args: argparse.Namespace) -> tuple[subprocess.Popen, Path, float]:
    """Starts a part; returns its process, its JSON file, and when it started."""
    folder = Path(args.output).resolve()
    path = folder / f"{name.replace(' ', '_')}.json"
    path.unlink(missing_ok=True)
    words = [word.format(tag=f"{time.time():.0f}", output=folder, data=args.data_path) for word in part.words.split()]
    words += ["--json", str(path)] * part.writes_json
    with open(path.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    return process, path, time.monotonic()


def finish(part: Part, process: subprocess.Popen, path: Path, started: float, limit: float) -> dict:
    """Waits for a part; returns its command, seconds, how it ended, the end of its output, and its JSON so far."""
    try:
        status = process.wait(timeout=limit)
        ended = "finished" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # including the processes that it started
        process.wait()
        ended = f"stopped after {limit:.0f} seconds"
    output = path.with_suffix(".log").read_text(errors="replace")
    return {"command": f"python {part.words}", "seconds": round(time.monotonic() - started, 1), "ended": ended,
            "output": output[-8000:], "result": json.loads(path.read_text()) if path.is_file() else None}


def page(environment: dict, parts: dict[str, dict]) -> str:
    """What was measured, as Markdown."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "timm", "git_commit"))
    lines = [f"# Measured on {environment['device']}", "", f"`python tools/bench/gpu_day.py`; {versions}.", "",
             "| part | command | seconds | |", "|---|---|---|---|"]
    lines += [f"| {name} | `{part['command']}` | {part['seconds']} | {part['ended']} |" for name, part in parts.items()]
    for name, part in parts.items():
        is_table = bool(part["result"])
        text = report(part["result"]) if is_table else "\n".join(part["output"].splitlines()[-30:])
        lines += ["", f"## {name.capitalize()}", "", text if is_table else f"```\n{text}\n```"]
    return "\n".join(lines) + "\n"


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures; returns 0, or 1 if a part did not finish."""
    args = parse_arguments(argv)
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA GPU here; on a CPU, use tools/bench/benchmark.py")
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    environment, parts = describe_environment(torch.device("cuda")), {}
    warm_up = start("warm up", WARM_UP, args)
    for name in args.parts:
        if name != "tests" and warm_up:  # nothing is timed while it runs
            parts["warm up"] = finish(WARM_UP, *warm_up, max(1, WARM_UP.limit - (time.monotonic() - warm_up[2])))
            warm_up = None
        left = end - time.monotonic()
        if left > 5:
            parts[name] = finish(PARTS[name], *start(name, PARTS[name], args), min(PARTS[name].limit, left))
            print(f"{name}: {parts[name]['ended']}, {parts[name]['seconds']} s", flush=True)
        # After each part, so that the results survive if the machine stops.
        write_text(folder / "report.json", json.dumps({"environment": environment, "parts": parts}, indent=1) + "\n")
        write_text(folder / "report.md", page(environment, parts))
    if warm_up:
        finish(WARM_UP, *warm_up, 1)
    print(f"written to {folder}/report.md and report.json")
    return 0 if all(part["ended"] == "finished" for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
