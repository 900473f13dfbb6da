"""The paper's tables with this repository's results, from finished runs, as Markdown:

    python tools/paper_tables.py                              # all tables, from the runs under output/
    python tools/paper_tables.py cifar10 --runs output docs/results

A run counts for the row with the same network, data and recipe, whatever its folder is called: its saved config is
compared with the row's. Several seeds give mean and standard deviation. Accuracies are those of the last epoch, in
percent; `best` is the best epoch's, selected on the same images. Of the network and its averaged weights the better
counts, as for the run itself. Evaluated checkpoints (eval.json) have separate lines. Cells without a run read "not
measured yet". tools/reproduce.py launches the runs.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, MissingFileError, one_line_errors, printable

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("table", nargs="*", help="tables of tools/tables.yaml; default: all")
PARSER.add_argument("--runs", nargs="+", metavar="DIR",
                    help="folders to search for runs, at any depth; default: output, if it exists")
PARSER.add_argument("--export", type=Path, metavar="DIR",
                    help="copy the records of the runs that the tables hold to DIR/ROW/seedN/, without paths of "
                         "this machine; --runs DIR makes the same tables again")
PARSER.add_argument("--tables", default=Path(__file__).with_name("tables.yaml"), metavar="FILE",
                    help="default: tools/tables.yaml")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import json
import statistics
from dataclasses import dataclass

import torch
import yaml

from config import flat_config, read_yaml
from inference import build_network
from logger import count_macs
from resume import FREE_KEYS
from tools.tables import Row, better, choose, final_results, read_tables

METRICS = {"acc1": "top-1", "acc5": "top-5"}
# What an evaluation depends on.
EVALUATION_KEYS = ("MODEL.", "DATA.DATASET", "DATA.HOLD_OUT", "DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP")


@dataclass(frozen=True)
class Run:
    """The results of a finished training, or of the evaluation of a checkpoint."""

    folder: Path
    config: dict  # flat
    result: dict  # acc1 and acc5 after the last epoch, in percent
    commit: str
    best: float = 0.0  # the best epoch's top-1
    batch: int | None = None  # images per update
    changes: tuple[str, ...] = ()  # of the settings during the training
    checkpoint: str = ""  # of an evaluation: the beginning of the file's SHA-256

    def differences(self, row: Row) -> list[str]:
        """The differences between the run's config and the row's."""
        keys = row.recipe.keys() - FREE_KEYS - {"SEED"}  # a row has runs of several
        if self.checkpoint:
            keys = {key for key in keys if key.startswith(EVALUATION_KEYS)} - {"MODEL.PRETRAINED"}
        differing = sorted(key for key in keys if self.config[key] != row.recipe[key])
        return [*self.changes, *(f"{key} {self.config[key]!r} instead of {row.recipe[key]!r}" for key in differing)]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for bad input."""
    args = PARSER.parse_args(argv)
    tables = read_tables(args.tables)
    chosen = choose(args.table, tables, "table")
    runs = find_runs(args.runs or [name for name in ["output"] if Path(name).is_dir()])
    strays = runs
    for name in chosen:
        title, rows = tables[name]
        found = {row.key: [run for run in runs if not run.differences(row)] for row in rows}
        strays = [run for run in strays if not any(run in row_runs for row_runs in found.values())]
        lines = [line for row in rows for line in lines_of_row(row, rows, found[row.key])]
        print(f"## {title}\n\n{to_markdown(lines)}")
        if args.export:
            export(found, args.export)
    report_strays(strays, tables, chosen)
    return 0


# ---- the runs ------------------------------------------------------------------------------------

def find_runs(folders: list[str]) -> list[Run]:
    """The finished trainings and the evaluations in folders, at any depth, sorted by path."""
    runs = []
    for top in map(Path, folders):
        if not top.is_dir():
            raise MissingFileError(f"there is no folder {top}; name the folders of your runs with --runs")
        for path in sorted(path for name in ("config.yaml", "eval.json") for path in top.rglob(name)):
            try:
                run = read_training(path) if path.name == "config.yaml" else read_evaluation(path)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{path.parent} holds a run that cannot be read ({error!r}); move it away") from None
            runs += [run] if run else []
    return runs


def read_training(path: Path) -> Run | None:
    """The training with that ``config.yaml``, if it is finished."""
    config = flat_config(read_yaml(path))
    results = final_results(path.parent, config["TRAIN.EPOCHS"])
    if not results:
        return None
    about = read_yaml(path.with_name("run.yaml"))
    changes = [f"{key} {value} since update {change['step']}"
               for change in about.get("changes", ()) for key, value in dict(change["keys"]).items()]
    return Run(path.parent, config, accuracies(results[-1]), printable(about["git_commit"]),
               best=max(result["acc1"] for result in results), batch=about["effective_batch"], changes=tuple(changes))


def read_evaluation(path: Path) -> Run:
    """The evaluation with that ``eval.json``."""
    report = json.loads(path.read_text(encoding="utf-8"))
    result = better(*(report[kind] for kind in ("eval", "eval_ema") if kind in report))
    return Run(path.parent, flat_config(report["config"]), accuracies(result),
               printable(report["environment"]["git_commit"]), checkpoint=printable(report["sha256"])[:8])


def accuracies(result: dict) -> dict[str, float]:
    """The results of an evaluation that the tables show."""
    return {metric: float(result[metric]) for metric in METRICS if metric in result}


def one_of_each_seed(runs: list[Run]) -> list[Run]:
    """The trainings by seed, without those that repeat a seed."""
    by_seed = {}
    for run in runs:
        first = run if run.checkpoint else by_seed.setdefault(run.config["SEED"], run)
        if first is not run:
            print(f"{run.folder} repeats seed {run.config['SEED']} of {first.folder} and is skipped", file=sys.stderr)
    return [by_seed[seed] for seed in sorted(by_seed)]


def report_strays(runs: list[Run], tables: dict, chosen: list[str]) -> None:
    """Reports how runs that are in no chosen table differ from the nearest row, if that is in a chosen table."""
    for run in runs:
        rows = [(run.differences(row), name, row.key) for name, (_, rows) in tables.items() for row in rows]
        differences, name, key = min(rows, key=lambda entry: len(entry[0]))
        if name in chosen and differences:
            print(f"{run.folder} is in no table; the nearest is {key}, but it has {', '.join(differences)}",
                  file=sys.stderr)


# ---- the table -----------------------------------------------------------------------------------

def lines_of_row(row: Row, rows: list[Row], runs: list[Run]) -> list[dict[str, str]]:
    """The lines of a row of a table, by column: one for its trainings, one for each evaluated checkpoint."""
    metrics = [metric for metric in METRICS if metric == "acc1" or any(metric in other.paper for other in rows)]
    config = row.config()
    with torch.device("meta"):
        network = build_network(config)
    macs = count_macs(network, (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))
    size = {"params (M)": f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}", "MACs (G)": f"{macs / 1e9:#.3g}"}
    evaluated = {run.checkpoint: [run] for run in runs if run.checkpoint}
    trained = one_of_each_seed(runs)
    lines = []
    sources = {"": trained} | evaluated if trained or not evaluated else evaluated
    for source, runs in sources.items():
        line = {"network": f"{row.name}, checkpoint {source}" if source else row.name} | size
        for metric in metrics:
            here, paper = [run.result[metric] for run in runs], row.paper.get(metric)
            line[METRICS[metric]] = spread(here) if here else "not measured yet"
            if any(other.paper for other in rows):
                line[f"paper's {METRICS[metric]}"] = f"{paper:.2f}" if paper is not None else ""
                difference = f"{statistics.mean(here) - paper:+.2f}" if here and paper is not None else ""
                line[f"{METRICS[metric]} difference"] = difference
        line["best"] = spread([run.best for run in runs]) if runs and not source else ""
        line["seeds"] = str(len(runs)) if runs and not source else ""
        line["batch"] = ", ".join(sorted({str(run.batch) for run in runs if run.batch}))
        line["commit"] = ", ".join(sorted({shorten(run.commit) for run in runs}))
        lines.append(line)
    return lines


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation (of a sample)."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def shorten(commit: str) -> str:
    """Seven digits of a commit; the mark of differing files is kept."""
    digits, dash, mark = commit.partition("-")
    return digits[:7] + dash + mark


# ---- what is written -----------------------------------------------------------------------------

def to_markdown(lines: list[dict[str, str]]) -> str:
    """The table in GitHub's Markdown."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def export(found: dict[str, list[Run]], folder: Path) -> None:
    """Copies the records behind the tables, and the curves, without the paths of this machine."""
    for key, runs in found.items():
        for run in one_of_each_seed(runs):
            target = folder / key / f"seed{run.config['SEED']}"
            target.mkdir(parents=True, exist_ok=True)
            config, about = read_yaml(run.folder / "config.yaml"), read_yaml(run.folder / "run.yaml")
            config["OUTPUT"], config["DATA"]["DATA_PATH"], config["MODEL"]["RESUME"] = "output", "", ""
            about.pop("command", None)
            for name, content in (("config.yaml", config), ("run.yaml", about)):
                (target / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            (target / "metrics.jsonl").write_bytes((run.folder / "metrics.jsonl").read_bytes())


if __name__ == "__main__":
    sys.exit(main())
