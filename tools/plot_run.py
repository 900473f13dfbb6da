"""Draws loss, accuracy and learning rate of one or several runs in one figure.

    python tools/plot_run.py output/smlp_nano_alpha3_patch2_32_digits/default
    python tools/plot_run.py output/smlp_nano_alpha3_patch2_32_cifar10/seed* --figure seeds.png
    python tools/plot_run.py docs/results/*_64_cifar10/seed* --by-folder     # a colour for each network

Every run also draws its own ``curves.png`` when it ends.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, one_line_errors

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                    help="a run's output folder, or its metrics.jsonl; several are drawn in one figure")
PARSER.add_argument("--by-folder", action="store_true",
                    help="one colour, and one mean, for the runs in a folder that differ only in their seeds")
PARSER.add_argument("--figure", default="curves.png", metavar="FILE",
                    help="the figure, .png, .pdf or .svg; default: curves.png")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import math

from config import flat_config, read_yaml
from plots import best_accuracy, draw_curves, read_metrics, run_names, save_figure


def groups_by_folder(folders: dict[str, Path]) -> dict[str, str]:
    """The folder of each run by the run's name; an InputError if the runs of a folder differ in more than their seeds,
    so that their mean has no meaning."""
    from resume import FREE_KEYS  # it imports PyTorch, which takes seconds

    groups = dict(zip(folders, run_names([folder.resolve().parent for folder in folders.values()]), strict=True))
    firsts = {}
    for name, folder in folders.items():
        config = flat_config(read_yaml(folder / "config.yaml"))
        first, other = firsts.setdefault(groups[name], (name, config))
        keys = sorted(key for key in config.keys() - FREE_KEYS - {"SEED"} if config[key] != other.get(key))
        if keys:
            raise InputError(f"--by-folder: {first} and {name} differ in {keys[0]}: {other.get(keys[0])!r} and "
                             f"{config[keys[0]]!r}; only runs that differ in their seeds can share a folder")
    return groups


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = PARSER.parse_args(argv)
    names = run_names(args.runs)
    runs = dict(zip(names, map(read_metrics, args.runs), strict=True))
    folders = {name: path if path.is_dir() else path.parent for name, path in zip(names, args.runs, strict=True)}
    save_figure(draw_curves(runs, groups_by_folder(folders) if args.by_folder else None), args.figure)
    for name, records in runs.items():
        best, epoch = best_accuracy(records)
        accuracy = "not evaluated yet" if math.isnan(best) else f"best top-1 {best:.3f} in epoch {epoch}"
        print(f"{name}: {records[-1]['step']} updates, {accuracy}")
    print(f"drawn to {args.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
