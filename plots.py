"""Pictures of runs: loss, accuracy and learning rate from ``metrics.jsonl``.

matplotlib is imported only where something is drawn, and drawn on a ``Figure`` of its own: no window, no global state.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by everyone
# What is drawn: panel, kind of record, figure in it, its look.
_LINES = (
    (0, "train", "loss", {"linewidth": 0.7, "alpha": 0.55}),
    (0, "eval", "loss", {"linewidth": 1.4}),
    (0, "eval_ema", "loss", {"linewidth": 1.4, "linestyle": "--"}),
    (1, "eval", "acc1", {"linewidth": 1.4}),
    (1, "eval_ema", "acc1", {"linewidth": 1.4, "linestyle": "--"}),
    (2, "train", "lr", {"linewidth": 1.4}),
)
_KINDS = {"train": "training", "eval": "validation", "eval_ema": "validation, averaged weights"}


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a run, in the order in which they were written.

    A last line that a run is still writing, or was killed in, is left out.

    Args:
        path: a run's output folder, or its ``metrics.jsonl``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no records, or a line that is none; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a run's folder, e.g. output/<MODEL.NAME>/<TAG>")
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path} is damaged: line {number} is not a record of a run: {line.strip()[:60]!r}; "
                             "delete the line to read the others") from None
    if not records:
        raise ValueError(f"{path} holds no records yet; a run writes the first after PRINT_FREQ updates")
    return records


def _record(record: dict) -> dict:
    """The record, if it has what a run writes; else one of ValueError, KeyError, TypeError."""
    needed = {"train": ("loss", "lr"), "eval": ("loss", "acc1"), "eval_ema": ("loss", "acc1")}[record["kind"]]
    figures = [record["step"], record["epoch"], *(record[name] for name in needed if record[name] is not None)]
    if not all(isinstance(figure, (int, float)) and figure >= 0 for figure in figures):
        raise ValueError
    return record


def select(records: list[dict], kind: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps and values of a figure, e.g. ``("eval", "acc1")``; not a number where it was not finite."""
    pairs = [(record["step"], record.get(figure)) for record in records if record["kind"] == kind]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def epochs_at(records: list[dict], steps: np.ndarray) -> np.ndarray | None:
    """The epochs done at each of these steps, with fractions; None for a run that has not finished one.

    The evaluations say at which step an epoch ended, so that runs of other batch sizes share an axis.
    """
    ends = {0: 0.0} | {record["step"]: record["epoch"] + 1.0 for record in records if record["kind"] == "eval"}
    if len(ends) == 1:
        return None
    known, epochs = np.array(list(ends)), np.array(list(ends.values()))
    pace = (epochs[-1] - epochs[-2]) / (known[-1] - known[-2])
    return np.interp(steps, known, epochs) + np.maximum(steps - known[-1], 0) * pace


def best_accuracy(records: list[dict]) -> tuple[float, int]:
    """The best top-1 accuracy, of the averaged weights where there are some, and its epoch; not a number for none."""
    kinds = {record["kind"] for record in records}
    kind = "eval_ema" if "eval_ema" in kinds else "eval"
    found = [(record["acc1"], record["epoch"]) for record in records if record["kind"] == kind]
    return max(found, key=lambda pair: pair[0], default=(float("nan"), 0))


def run_names(paths: list[str | Path]) -> list[str]:
    """A name for each run's folder: its tag, with as many of the folders above it as tell the runs apart."""
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in (Path(p).resolve() for p in paths)]
    for length in itertools.count(1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names


def draw_curves(runs: dict[str, list[dict]]):
    """Loss, top-1 accuracy and learning rate of runs, over epochs where every run has finished one, else over updates.

    Args:
        runs: the records of each run, as ``read_metrics`` returns them, by its name.

    Returns:
        A matplotlib Figure of three panels, a colour for each run.
    """
    bests = {name: best_accuracy(records)[0] for name, records in runs.items()}
    names = [name if math.isnan(best) else f"{name}: best {best:.2f} %" for name, best in bests.items()]
    columns = max(1, 130 // max(map(len, names)))
    figure, panels = new_figure(1, 3, size=(10.5, 3.2 + 0.2 * -(-len(runs) // columns)))
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    many = colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))
    colours = dict(zip(runs, COLOURS if len(runs) <= len(COLOURS) else many, strict=False))
    in_epochs = all(epochs_at(records, np.zeros(0)) is not None for records in runs.values())
    for name, records in runs.items():
        for panel, kind, value, look in _LINES:
            steps, values = select(records, kind, value)
            x = epochs_at(records, steps) if in_epochs else steps
            if len(x):
                panels[panel].plot(x, values, color=colours[name], marker="." if len(x) == 1 else None, **look)
    for panel, title in zip(panels, ("Loss", "Top-1 accuracy (%)", "Learning rate"), strict=True):
        panel.set_title(title)
        panel.set_xlabel("epoch" if in_epochs else "update")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[2].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    present = {record["kind"] for records in runs.values() for record in records}
    looks = {kind: look for _, kind, value, look in _LINES if value == "loss" and kind in present}
    panels[0].legend([Line2D([], [], color="0.3", **look) for look in looks.values()], [_KINDS[kind] for kind in looks])
    figure.legend([Line2D([], [], color=colour, linewidth=1.4) for colour in colours.values()], names, ncols=columns,
                  loc="outside lower center", frameon=False)
    return figure


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A Figure of ``size`` inches and its panels (squeezed, as ``Figure.subplots`` returns them).

    Call it before anything else of matplotlib is imported, so that its error is the one to be seen.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"drawing needs matplotlib ({error}); install it with: pip install matplotlib") from error
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    panels = figure.subplots(rows, columns, **options)
    return figure, panels


def save_figure(figure, path: str | Path) -> None:
    """Writes a picture; the file's ending says of which kind, PNG where it has none.

    Raises:
        OSError: it cannot be written.
        ValueError: the ending is of no known kind.
    """
    path = Path(path)
    try:
        figure.savefig(path, format=path.suffix[1:] or "png")
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}); choose another --output") from error
    except ValueError as error:
        raise ValueError(f"cannot write {path}: {error}") from error
