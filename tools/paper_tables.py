"""The paper's tables with this repository's results, from finished runs, as Markdown and CSV:

    python tools/paper_tables.py                              # all tables, from the runs under output/
    python tools/paper_tables.py cifar10 --runs output docs/results
    python tools/paper_tables.py cifar10_cpu --output docs/results     # docs/results/cifar10_cpu.md and .csv

A run counts for the row with the same network, data and recipe, whatever its folder is called: its saved config is
compared with the row's. Several seeds give mean and standard deviation. Accuracies are those of the last epoch, in
percent; `best` is the best epoch's, selected on the same images. Evaluated checkpoints (eval.json) have separate lines.
Cells without a run read "not measured yet". tools/reproduce.py launches the runs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, MissingFileError, one_line_errors, printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="*", help="tables of tools/tables.yaml; default: all")
    parser.add_argument("--runs", nargs="+", metavar="DIR",
                        help="folders to search for runs, at any depth; default: output, if it exists")
    parser.add_argument("--output", metavar="DIR", help="write DIR/TABLE.md and DIR/TABLE.csv; default: print Markdown")
    parser.add_argument("--export", metavar="DIR", help="copy the records of the runs that the tables hold to "
                        "DIR/ROW/seedN/, without paths of this machine; --runs DIR makes the same tables again")
    parser.add_argument("--tables", default=Path(__file__).with_name("tables.yaml"), metavar="FILE",
                        help="default: tools/tables.yaml")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()  # before the slow imports, so that --help is fast

import csv
import io
import json
import statistics
from dataclasses import dataclass

import torch
import yaml

from config import flat_config, read_yaml
from inference import build_network
from logger import count_macs
from resume import FREE_KEYS
from tools.tables import Row, choose, final_results, read_tables

MISSING = "not measured yet"
METRICS = {"acc1": "top-1", "acc5": "top-5"}
# What an evaluation depends on.
EVALUATION_KEYS = ("MODEL.", "DATA.DATASET", "DATA.HOLD_OUT", "DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP")


@dataclass(frozen=True)
class Run:
    """The results of a finished training, or of the evaluation of a checkpoint."""

    folder: Path
    config: dict  # flat
    checkpoint: str  # of an evaluation: the beginning of the file's SHA-256; empty for a training
    result: dict  # acc1 and acc5 after the last epoch, in percent
    best: float  # the best epoch's top-1
    batch: int | None  # images per update
    commit: str
    changes: tuple[dict, ...] = ()  # of the settings during the training

    def differences(self, row: Row) -> list[str]:
        """The differences between the run's config and the row's."""
        wanted = row.recipe
        keys = wanted.keys() - FREE_KEYS - {"SEED"}  # a row has runs of several
        if self.checkpoint:
            keys = {key for key in keys if key.startswith(EVALUATION_KEYS)} - {"MODEL.PRETRAINED"}
        differing = sorted(key for key in keys if self.config[key] != wanted[key])
        changed = [f"{key} {value} since update {change['step']}"
                   for change in self.changes for key, value in change["keys"].items()]
        return changed + [f"{key} {self.config[key]!r} instead of {wanted[key]!r}" for key in differing]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 0, or 2 for bad input."""
    args = parse_arguments(argv)
    tables = read_tables(args.tables)
    runs = find_runs(args.runs or [name for name in ["output"] if Path(name).is_dir()])
    placed = []
    for name in choose(args.table, tables, "table"):
        title, rows = tables[name]
        found = {row.key: [run for run in runs if not run.differences(row)] for row in rows}
        placed += [run for row_runs in found.values() for run in row_runs]
        table = make_table(rows, found)
        if args.output:
            write_table(Path(args.output, name), title, table)
        else:
            print(f"## {title}\n\n{to_markdown(table)}")
        if args.export:
            export(found, Path(args.export))
    report_strays([run for run in runs if run not in placed], tables, choose(args.table, tables, "table"))
    return 0


# ---- the runs ------------------------------------------------------------------------------------

def find_runs(folders: list[str]) -> list[Run]:
    """The finished trainings and the evaluations in folders, at any depth, sorted by path.

    Raises:
        InputError: a file of a run cannot be read.
        MissingFileError: one of the folders does not exist.
    """
    runs = []
    for top in map(Path, folders):
        if not top.is_dir():
            raise MissingFileError(f"there is no folder {top}; name the folders of your runs with --runs")
        for folder in sorted({path.parent for name in ("config.yaml", "eval.json") for path in top.rglob(name)}):
            try:
                runs += [run for run in (read_training(folder), read_evaluation(folder)) if run]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"{folder} holds a run that cannot be read ({error!r}); move it away") from None
    return runs


def read_training(folder: Path) -> Run | None:
    """The training in a folder, if it is finished."""
    if not (folder / "config.yaml").is_file():
        return None
    config = flat_config(read_yaml(folder / "config.yaml"))
    results = final_results(folder, config["TRAIN.EPOCHS"])
    if not results:
        return None
    about = read_yaml(folder / "run.yaml")
    return Run(
        folder=folder, config=config, checkpoint="", result=accuracies(results[-1]),
        best=max(r["acc1"] for r in results), batch=about["effective_batch"], commit=printable(about["git_commit"]),
        changes=tuple({"step": change["step"], "keys": dict(change["keys"])} for change in about.get("changes", ())),
    )


def read_evaluation(folder: Path) -> Run | None:
    """The evaluation in a folder, if there is one."""
    if not (folder / "eval.json").is_file():
        return None
    report = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    result = report.get("eval_ema") or report["eval"]
    return Run(
        folder=folder, config=flat_config(report["config"]), checkpoint=printable(report["sha256"])[:8],
        result=accuracies(result), best=float(result["acc1"]), batch=None,
        commit=printable(report["environment"]["git_commit"]),
    )


def accuracies(result: dict) -> dict[str, float]:
    """The results of an evaluation that the tables show."""
    return {metric: float(result[metric]) for metric in METRICS if metric in result}


def one_of_each_seed(runs: list[Run]) -> list[Run]:
    """The runs by seed, without those that repeat a seed."""
    by_seed = {}
    for run in runs:
        seed = run.config["SEED"]
        if seed in by_seed:
            print(f"{run.folder} repeats seed {seed} of {by_seed[seed].folder} and is skipped", file=sys.stderr)
        by_seed.setdefault(seed, run)
    return [by_seed[seed] for seed in sorted(by_seed)]


def report_strays(runs: list[Run], tables: dict, chosen: list[str]) -> None:
    """Reports how runs that are in no chosen table differ from the nearest row, if that is in a chosen table."""
    for run in runs:
        rows = [(len(run.differences(row)), name, row) for name, (_, rows) in tables.items() for row in rows]
        _, name, row = min(rows, key=lambda entry: entry[0])
        differences = ", ".join(run.differences(row))
        if name in chosen and differences:
            print(f"{run.folder} is in no table; the nearest is {row.key}, but it has {differences}", file=sys.stderr)


# ---- the table -----------------------------------------------------------------------------------

def make_table(rows: list[Row], found: dict[str, list[Run]]) -> list[dict[str, str]]:
    """The lines of a table, by column."""
    metrics = [metric for metric in METRICS if metric == "acc1" or any(metric in row.paper for row in rows)]
    has_paper = any(row.paper for row in rows)
    table = []
    for row in rows:
        trained = one_of_each_seed([run for run in found[row.key] if not run.checkpoint])
        evaluated = {run.checkpoint: [run] for run in found[row.key] if run.checkpoint}
        statistics_cells = describe(row)
        sources = {"": trained} | evaluated if trained or not evaluated else evaluated
        for source, runs in sources.items():
            line = {"network": f"{row.name}, checkpoint {source}" if source else row.name} | statistics_cells
            for metric in metrics:
                line |= compare(row, runs, metric, has_paper)
            line["best"] = spread([run.best for run in runs]) if runs and not source else ""
            line["seeds"] = str(len(runs)) if runs and not source else ""
            line["batch"] = ", ".join(sorted({str(run.batch) for run in runs if run.batch}))
            line["commit"] = ", ".join(sorted({shorten(run.commit) for run in runs}))
            table.append(line)
    return table


def describe(row: Row) -> dict[str, str]:
    """The cells on the network itself."""
    config = row.config()
    with torch.device("meta"):
        model = build_network(config)
    macs = count_macs(model, (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))
    parameters = sum(p.numel() for p in model.parameters())
    return {"params (M)": f"{parameters / 1e6:.2f}", "MACs (G)": f"{macs / 1e9:#.3g}"}


def compare(row: Row, runs: list[Run], metric: str, has_paper: bool) -> dict[str, str]:
    """The cells for one accuracy: this repository's, the paper's, and the difference."""
    label = METRICS[metric]
    here = [run.result[metric] for run in runs]
    cells = {label: spread(here) if here else MISSING}
    if has_paper:
        paper = row.paper.get(metric)
        cells[f"paper's {label}"] = "" if paper is None else f"{paper:.2f}"
        cells[f"{label} difference"] = f"{statistics.mean(here) - paper:+.2f}" if here and paper is not None else ""
    return cells


def spread(values: list[float]) -> str:
    """Mean and, of several values, standard deviation (of a sample)."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def shorten(commit: str) -> str:
    """Seven digits of a commit; the mark of differing files is kept."""
    digits, dash, mark = commit.partition("-")
    return digits[:7] + dash + mark


# ---- what is written -----------------------------------------------------------------------------

def to_markdown(table: list[dict[str, str]]) -> str:
    """The table in GitHub's Markdown."""
    lines = [list(table[0]), ["---"] * len(table[0]), *(line.values() for line in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_csv(table: list[dict[str, str]]) -> str:
    """The table as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def write_table(stem: Path, title: str, table: list[dict[str, str]]) -> None:
    """Writes ``stem``.md and ``stem``.csv."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(f"{title}\n\n{to_markdown(table)}", encoding="utf-8")
    stem.with_suffix(".csv").write_text(to_csv(table), encoding="utf-8")
    print(f"written {stem.with_suffix('.md')} and {stem.with_suffix('.csv')}")


def export(found: dict[str, list[Run]], folder: Path) -> None:
    """Copies the records behind the tables, and the curves, without the paths of this machine."""
    for key, runs in found.items():
        for run in one_of_each_seed([run for run in runs if not run.checkpoint]):
            target = folder / key / f"seed{run.config['SEED']}"
            target.mkdir(parents=True, exist_ok=True)
            config = read_yaml(run.folder / "config.yaml")
            config |= {"OUTPUT": "output", "DATA": config["DATA"] | {"DATA_PATH": ""}}
            config["MODEL"] |= {"RESUME": ""}
            about = read_yaml(run.folder / "run.yaml")
            about.pop("command", None)
            for name, content in (("config.yaml", config), ("run.yaml", about)):
                (target / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            (target / "metrics.jsonl").write_bytes((run.folder / "metrics.jsonl").read_bytes())


if __name__ == "__main__":
    sys.exit(main())
