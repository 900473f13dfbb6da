"""CPU seconds of a training step (forward, loss, backward, AdamW) of each network of a table, measured in turn.

    python tools/step_times.py cifar10_cpu      # with OMP_NUM_THREADS=1 in the environment, on one thread
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference import build_network
from tools.lib.tables import choose, read_tables
from utils import one_line_errors


def step_seconds(configs: dict, images: int, turns: int) -> dict[str, list[float]]:
    """CPU seconds of each turn's step, by the network's name."""
    steps = {}
    for name, config in configs.items():
        model, size = build_network(config).train(), config.DATA.IMG_SIZE
        batch = torch.randn(images, 3, size, size), torch.arange(images) % config.MODEL.NUM_CLASSES
        steps[name] = model, torch.optim.AdamW(model.parameters(), fused=True), batch, []
    for _ in range(turns):
        for model, optimizer, (inputs, targets), seconds in steps.values():
            start = time.process_time()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.process_time() - start)
    return {name: seconds for name, (*_, seconds) in steps.items()}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="a table of tools/tables.yaml")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per step; default: 128")
    parser.add_argument("--turns", type=int, default=8, metavar="N", help="steps per network; default: 8")
    args = parser.parse_args(argv)
    tables = read_tables()
    _, rows = tables[choose([args.table], tables, "table")[0]]
    print("| network | least | median |\n| --- | --- | --- |")
    for name, seconds in step_seconds({row.name: row.config() for row in rows}, args.batch_size, args.turns).items():
        print(f"| {name} | {min(seconds):.2f} | {sorted(seconds)[len(seconds) // 2]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
