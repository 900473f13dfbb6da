"""All of this repository's measurements on a GPU, in one command of at most nine minutes.

    python tools/measure_gpu.py                    # on the machine with the GPU

It runs in turn: the tests that need CUDA; the networks, eager; each operation of a training step and of the inference
form, compared with its prediction; the strip operator alone; the networks, compiled. Each part has a time limit, and a
part that fails or exceeds it does not stop the others. Writes OUTPUT/report.json, with every time, and
OUTPUT/report.md, the section for docs/benchmarks.md.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from logger import describe_environment
from utils import InputError, one_line_errors

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """A command, after ``python``, and the seconds that it may take."""

    words: str
    limit: int
    writes_json: bool = True  # by --json FILE


PARTS = {
    "tests": Part("-m pytest -m cuda -q -p no:cacheprovider", 150, writes_json=False),
    "networks": Part("tools/benchmark.py --parts networks --no-compile", 110),
    "training operations": Part("tools/roofline.py --model strip_mlp_tiny_light --measured --rows 40", 40),
    "inference operations": Part(
        "tools/roofline.py --model strip_mlp_tiny_light --measured --rows 40 --mode inference --form fused", 25),
    "operator": Part("tools/benchmark.py --parts operator", 60),
    "compiled": Part("tools/benchmark.py --parts networks --models strip_mlp_tiny_light --peers", 75),
    "compiled peers": Part("tools/benchmark.py --parts networks --models strip_mlp_tiny --peers convnext_tiny", 75),
}


def run(name: str, part: Part, folder: Path) -> dict:
    """Runs a part; returns its output, its JSON, its seconds, and how it ended."""
    words, path = [sys.executable, *part.words.split()], folder / f"{name.replace(' ', '_')}.json"
    if part.writes_json:
        path.unlink(missing_ok=True)
        words += ["--json", str(path)]
    start = time.monotonic()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=part.limit)
            ended = "finished" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # including the processes that it started
            output, errors = process.communicate()
            ended = f"stopped after its limit of {part.limit} seconds"
    return {
        "command": f"python {part.words}", "seconds": round(time.monotonic() - start, 1), "ended": ended,
        "output": output, "errors": errors[-4000:] if ended != "finished" else "",
        "result": json.loads(path.read_text()) if ended == "finished" and part.writes_json else None,
    }


def page(environment: dict, parts: dict[str, dict]) -> str:
    """What was measured, as Markdown."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "timm", "git_commit"))
    lines = [f"# Measured on {environment['device']}", "", f"`python tools/measure_gpu.py`; {versions}.", "",
             "| part | command | seconds | |", "|---|---|---|---|"]
    lines += [f"| {name} | `{part['command']}` | {part['seconds']} | {part['ended']} |" for name, part in parts.items()]
    for name, part in parts.items():
        text = part["output"].split("\n\n", 1)[-1] if part["result"] else "\n".join(part["output"].splitlines()[-15:])
        lines += ["", f"## {name.capitalize()}", "", text.strip() if part["result"] else f"```\n{text}\n```"]
        if part["errors"]:
            lines += ["", f"```\n{part['errors'].strip()[-1500:]}\n```"]
    return "\n".join(lines) + "\n"


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures; returns 0, or 1 if a part did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"default: all, which are {', '.join(map(repr, PARTS))}")
    parser.add_argument("--output", default="output/gpu", metavar="DIR", help="default: output/gpu")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError("PyTorch finds no CUDA GPU here; on a CPU, use tools/benchmark.py")
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    environment, parts = describe_environment(torch.device("cuda")), {}
    for name in args.parts:
        parts[name] = run(name, PARTS[name], folder)
        print(f"{name}: {parts[name]['ended']}, {parts[name]['seconds']} s", flush=True)
        # After each part, so that the results survive if the machine stops.
        (folder / "report.json").write_text(json.dumps({"environment": environment, "parts": parts}, indent=1) + "\n")
        (folder / "report.md").write_text(page(environment, parts))
    print(f"written to {folder}/report.md and report.json")
    return 0 if all(part["ended"] == "finished" for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
