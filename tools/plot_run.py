"""Draws loss, accuracy and learning rate of one or several runs in one figure.

    python tools/plot_run.py output/smlp_nano_alpha3_patch2_32_digits/default
    python tools/plot_run.py output/smlp_nano_alpha3_patch2_32_cifar10/seed* --output seeds.png
    python tools/plot_run.py docs/results/*_64_cifar10/seed* --by-folder     # a colour for each network

Every run also draws its own ``curves.png`` when it ends.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from plots import best_accuracy, draw_curves, read_metrics, run_names, save_figure
from utils import one_line_errors


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run's output folder, or its metrics.jsonl; several are drawn in one figure")
    parser.add_argument("--by-folder", action="store_true",
                        help="one colour for the runs that share a folder, such as the seeds of a network")
    parser.add_argument("--output", default="curves.png", metavar="FILE",
                        help="the figure, .png, .pdf or .svg; default: curves.png")
    args = parser.parse_args(argv)
    runs = dict(zip(run_names(args.runs), map(read_metrics, args.runs), strict=True))
    folders = [(path if path.is_dir() else path.parent).parent.name for path in map(Path, args.runs)]
    groups = dict(zip(runs, folders, strict=True)) if args.by_folder else None
    save_figure(draw_curves(runs, groups), args.output)
    for name, records in runs.items():
        best, epoch = best_accuracy(records)
        accuracy = "not evaluated yet" if math.isnan(best) else f"best top-1 {best:.3f} in epoch {epoch}"
        print(f"{name}: {records[-1]['step']} updates, {accuracy}")
    print(f"drawn to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
