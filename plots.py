"""What a run wrote to ``metrics.jsonl``, and figures: curves of runs, contact sheets of images."""

import io
import itertools
import json
import math
import os
import statistics
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's value for its kernel would fail in a process of its own

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageDraw, ImageFont, ImageOps

from utils import InputError, MissingFileError, printable

matplotlib.rcParams["text.parse_math"] = False  # names may hold dollar signs

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # also for colour-blind readers
# What is drawn: panel, kind of record, its key, line style.
_LINES = (
    (0, "train", "loss", {"linewidth": 0.7, "alpha": 0.55}),
    (0, "eval", "loss", {"linewidth": 1.4}),
    (0, "eval_ema", "loss", {"linewidth": 1.4, "linestyle": "--"}),
    (1, "eval", "acc1", {"linewidth": 1.4}),
    (1, "eval_ema", "acc1", {"linewidth": 1.4, "linestyle": "--"}),
    (2, "train", "lr", {"linewidth": 1.4}),
)
_NEEDED = {"train": ("loss", "lr"), "eval": ("loss", "acc1"), "eval_ema": ("loss", "acc1")}
_KINDS = {"train": "training", "eval": "validation", "eval_ema": "validation, averaged weights"}


# ---- the records of a run ------------------------------------------------------------------------

def parse_metrics(path: Path) -> list[tuple[str, dict | None]]:
    """Each line of a ``metrics.jsonl`` with its record, or with None if it holds none.

    A record has ``kind``, ``step`` (updates), ``epoch``, ``epochs`` done, with fractions, and figures, which are None
    where they were not finite.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    return [(line, _parse_record(line)) for line in lines]


def _parse_record(line: str) -> dict | None:
    try:
        record = json.loads(line)
        figures = [record[name] for name in _NEEDED.get(record["kind"], ()) if record[name] is not None]
        figures += [record["step"], record["epoch"], record["epochs"]]
        is_valid = isinstance(record["kind"], str) and all(
            type(figure) in (int, float) and 0 <= float(figure) < math.inf for figure in figures)
        return record if is_valid else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a run, named by its folder or its ``metrics.jsonl``, as ``parse_metrics`` describes them.

    An incomplete last line, of a run that is still writing or was killed, is skipped; any other that is no record is an
    InputError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if path.suffix in (".pth", ".safetensors"):
        raise InputError(f"{path} is a checkpoint; name the run's folder, {path.parent}")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; name a run's folder, e.g. output/<MODEL.NAME>/<TAG>")
    parsed = parse_metrics(path)
    if parsed and not parsed[-1][0].endswith("\n"):
        parsed = parsed[:-1]
    for number, (line, record) in enumerate(parsed, start=1):
        if record is None:
            raise InputError(f"{path} is damaged: line {number} is not a record of a run: {line.strip()[:60]!r}; "
                             "delete the line to read the others")
    if not parsed:
        raise InputError(f"{path} holds no records yet; a run writes the first one after PRINT_FREQ updates")
    return [record for _, record in parsed]


def select(records: list[dict], kind: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """The epochs done and the values of a figure, e.g. ``("eval", "acc1")``; nan where it was not finite."""
    pairs = [(record["epochs"], record.get(figure)) for record in records if record["kind"] == kind]
    epochs, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(epochs, dtype=float), np.array(values, dtype=float)


def best_accuracy(records: list[dict]) -> tuple[float, int]:
    """The best top-1 accuracy, of the network or of its averaged weights, and its epoch; nan if there is none."""
    found = [(record["acc1"], record["epoch"]) for record in records if record["kind"] in ("eval", "eval_ema")]
    return max(found, key=lambda pair: pair[0], default=(float("nan"), 0))


def run_names(paths: list[str | Path]) -> list[str]:
    """A name for each run's folder: its tag, with as many parent folders as are needed to tell the runs apart."""
    folders = [path.parent if path.name == "metrics.jsonl" else path for path in (Path(p).resolve() for p in paths)]
    for length in itertools.count(1):
        names = [printable("/".join(folder.parts[-length:])) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return names


# ---- figures -------------------------------------------------------------------------------------

def draw_curves(runs: dict[str, list[dict]], groups: dict[str, str] | None = None):
    """A Figure of loss, top-1 accuracy and learning rate over the epochs of runs.

    ``runs`` holds the records of each run by its name; ``groups`` the group of each run, such as the network that it is
    one seed of. A group has one colour.
    """
    groups = groups or {name: name for name in runs}
    members = {group: [name for name in runs if groups[name] == group] for group in groups.values()}
    names = [_legend(group, [best_accuracy(runs[name])[0] for name in members[group]]) for group in members]
    columns = max(1, 130 // max(map(len, names)))
    figure, panels = new_figure(1, 3, size=(10.5, 3.2 + 0.2 * -(-len(members) // columns)))
    many = colormaps["turbo"](np.linspace(0.05, 0.95, len(members)))
    colours = dict(zip(members, COLOURS if len(members) <= len(COLOURS) else many, strict=False))
    for name, records in runs.items():
        for panel, kind, value, look in _LINES:
            epochs, values = select(records, kind, value)
            if len(epochs):
                marker = "." if len(epochs) == 1 else None
                panels[panel].plot(epochs, values, color=colours[groups[name]], marker=marker, **look)
    for panel, title in zip(panels, ("Loss", "Top-1 accuracy (%)", "Learning rate"), strict=True):
        panel.set(title=title, xlabel="epoch")
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


def _legend(group: str, bests: list[float]) -> str:
    """A group's line in the legend: the best accuracy of its run, or mean and sample deviation over its runs."""
    if any(map(math.isnan, bests)):
        return group
    spread = f" ± {statistics.stdev(bests):.2f}" if len(bests) > 1 else ""
    return f"{group}: best {statistics.mean(bests):.2f}{spread} %"


def new_figure(rows: int, columns: int, size: tuple[float, float], **options):
    """A Figure of ``size`` inches and its panels, as ``Figure.subplots`` returns them."""
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure, path: str | Path) -> None:
    """Writes a figure in the format of the file's extension, by default PNG (of 128 colours: a third of the size)."""
    path = Path(path)
    try:
        if path.suffix in ("", ".png"):
            figure.savefig(pixels := io.BytesIO(), format="png")
            Image.open(pixels).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
        else:
            figure.savefig(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path} ({reason}); choose another file") from error


# ---- contact sheets ------------------------------------------------------------------------------

_SIDE, _GAP, _LINE = 160, 10, 18  # pixels: side of an image, space between cells, height of a line of text


def thumbnail(picture: Image.Image) -> Image.Image:
    """The whole image, as large as fits into a cell; small ones show their pixels."""
    is_small = max(picture.size) < _SIDE
    return ImageOps.contain(picture, (_SIDE, _SIDE), Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS)


def draw_sheet(cells: list[tuple[str, Image.Image, list[tuple[str, float]]]]) -> Image.Image:
    """A grid of ``(title, thumbnail, [(class name, probability), ...])``, probabilities as bars behind the names."""
    columns = min(math.ceil(math.sqrt(len(cells))), 10)
    lines = 1 + max(len(classes) for *_, classes in cells)
    width, height = _SIDE + _GAP, _SIDE + lines * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-len(cells) // columns) * height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (title, picture, classes) in enumerate(cells):
        x, y = _GAP + index % columns * width, _GAP + index // columns * height
        sheet.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
        y += _SIDE
        draw.text((x, y + 3), _fit(printable(title), font, _SIDE), "gray", font)
        for name, probability in classes:
            y += _LINE
            percent = f"{probability:.1%}"
            room = _SIDE - font.getlength(percent) - 10
            draw.rectangle((x, y + 1, x + round(probability * (_SIDE - 1)), y + _LINE - 2), "lightblue")
            draw.text((x + 3, y + 3), _fit(printable(name), font, room), "black", font)
            draw.text((x + _SIDE - 3, y + 3), percent, "black", font, anchor="ra")
    return sheet


def _fit(text: str, font, width: float) -> str:
    """The text, or as much of its beginning as fits, with dots for the rest."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def check_sheet(path: Path) -> None:
    """Raises InputError if a contact sheet cannot be written to a path, before anything is computed."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--sheet {path}: the sheet is a PNG; use a name that ends in .png")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--sheet {path}: {path.parent} is not a writable folder; create it first")
