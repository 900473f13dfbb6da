"""Estimates the GPU hours of all runs of each table, from their multiply-accumulates and an assumed rate:

    python tools/gpu_hours.py                # at 30 T operations per second, a tenth of an A100's peak in bf16
    python tools/gpu_hours.py --rate 100

It counts six operations for each multiply-accumulate of the forward pass, two forward and four backward. Data loading
and evaluation are not included.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference import build_network
from logger import count_macs
from tools.lib.tables import Row, read_tables
from utils import one_line_errors

IMAGES = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "caltech101": 6_900}  # of the training sets


def gpu_hours(rows: list[Row], rate: float) -> float:
    """Hours of one run of each row, at ``rate`` operations per second."""
    hours = 0.0
    for config in [row.config() for row in rows]:
        with torch.device("meta"):
            macs = count_macs(build_network(config), (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))
        hours += 6 * macs * IMAGES[config.DATA.DATASET] * config.TRAIN.EPOCHS / rate / 3600
    return hours


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=30, metavar="T", help="10^12 operations per second; default: 30")
    args = parser.parse_args(argv)
    for table, (_, rows) in read_tables().items():
        print(f"{table}: {gpu_hours(rows, args.rate * 1e12):.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
