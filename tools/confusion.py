"""Confusion matrix, recall, precision and F1 of each class, from the predictions that an evaluation wrote.

    python main.py --eval --cfg configs/X.yaml --data-path DIR --resume CKPT --opts TEST.PREDICTIONS True
    python tools/confusion.py output/X/default
    python tools/confusion.py output/X/default --sheet mistakes.png --data-path DIR     # also shows the mistakes

Writes into the same folder:
  confusion.csv   number of images of each true class (row) predicted as each class (column)
  classes.csv     per class: images, correct ones, recall (the class's accuracy), precision, F1, images predicted as it,
                  most frequent error
  confusion.png   the matrix as shares of each row, and the recall of each class
and prints the accuracy, the means over the classes, and the ten pairs of classes that are confused most.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import InputError, MissingFileError, csv_cell, one_line_errors

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("predictions", type=Path, metavar="PREDICTIONS",
                    help="predictions.csv, or the output folder that holds it")
PARSER.add_argument("--output", type=Path, metavar="DIR",
                    help="folder for the results; default: that of predictions.csv")
PARSER.add_argument("--sheet", type=Path, metavar="FILE.png",
                    help="also draw a contact sheet of up to 64 mistakes, the most confident first")
PARSER.add_argument("--data-path", metavar="DIR", help="--sheet: the data set's folder; default: the evaluation's")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import csv
import json

import numpy as np
from matplotlib.colors import PowerNorm

from plots import COLOURS, check_sheet, draw_sheet, new_figure, save_figure, thumbnail

_COLUMNS = ("index", "target", "prediction", "probability", "target_label", "prediction_label")
_SHOWN = 64  # most mistakes on the contact sheet
_NUMBERED = 20  # most classes for which the numbers fit into the cells
_NAMED = 60  # most classes for which the names fit beside the matrix
_MOST = 30_000  # classes; their matrix takes 7 GB


def read_predictions(path: Path) -> tuple[np.ndarray, list[str], list[tuple[float, int, str, str]]]:
    """The confusion matrix of a ``predictions.csv``, (true class, predicted class) -> images; the names of the classes;
    and each mistake as (probability, index of the image, true class, predicted class)."""
    again = "write it again with main.py --eval --opts TEST.PREDICTIONS True"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; main.py --eval writes it with --opts TEST.PREDICTIONS True")
    labels, names, mistakes = [], {}, []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise InputError(f"{path} has no column {' or '.join(missing)}; {again}")
        line = 1
        try:
            for row in rows:
                line = rows.line_num
                pair = int(row["target_label"]), int(row["prediction_label"])
                for label, name in zip(pair, (row["target"], row["prediction"]), strict=True):
                    if not 0 <= label < _MOST or names.setdefault(label, name) != name:
                        raise ValueError
                labels.append(pair)
                if pair[0] != pair[1]:
                    mistakes.append((float(row["probability"]), int(row["index"]), row["target"], row["prediction"]))
        except (ValueError, TypeError, csv.Error) as error:
            line += isinstance(error, csv.Error)  # it could not be read
            raise InputError(f"{path} is damaged: line {line} is not a prediction; {again}") from None
    if not labels:
        raise InputError(f"{path} holds no predictions")
    matrix = np.zeros((max(names) + 1,) * 2, dtype=np.int64)
    np.add.at(matrix, tuple(np.transpose(labels)), 1)
    return matrix, [csv_cell(names.get(label, str(label))) for label in range(len(matrix))], mistakes


def scores(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall (the share of its images that were classified correctly), precision and F1 of each class in percent; nan
    for a class without images, or never predicted, or both."""
    hits, images, taken = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return 100 * hits / images, 100 * hits / taken, 200 * hits / (images + taken)


def most_confused(matrix: np.ndarray, count: int = 10) -> list[tuple[int, int, int]]:
    """The ``count`` most frequent errors as (true class, predicted class, images), the most frequent first."""
    errors = matrix - np.diag(matrix.diagonal())
    pairs = zip(*np.unravel_index(np.argsort(-errors, axis=None, kind="stable")[:count], errors.shape), strict=True)
    return [(int(target), int(prediction), int(errors[target, prediction]))
            for target, prediction in pairs if errors[target, prediction]]


def draw_confusion(matrix: np.ndarray, names: list[str]):
    """The matrix, darker for a larger share of the row, beside the recall of each class; numbers and names if they
    fit."""
    classes, total, (recalls, _, _) = len(matrix), matrix.sum(), scores(matrix)
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, (left, right) = new_figure(1, 2, size=(10, 5.4), width_ratios=(1.7, 1))
    image = left.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="auto")  # shows rare confusions too
    figure.colorbar(image, ax=left, label="% of the true class", ticks=(0, 1, 5, 10, 25, 50, 100))
    left.set(xlabel="predicted class", ylabel="true class",
             title=f"{100 * matrix.trace() / total:.2f} % of {total} images correct")
    if classes <= _NUMBERED:
        for target, prediction in np.argwhere(matrix):
            left.text(prediction, target, matrix[target, prediction], ha="center", va="center",
                      fontsize=8 if classes <= 12 else 6, color="white" if shares[target, prediction] > 30 else "black")
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    if classes <= _NAMED:
        size = min(9, 300 / classes)
        left.set_xticks(range(classes), short, rotation=90 if max(map(len, short)) > 2 else 0, fontsize=size)
        left.set_yticks(range(classes), short, fontsize=size)
        bars = right.barh(range(classes), np.nan_to_num(recalls), color=COLOURS[0])
        right.bar_label(bars, ["no images" if np.isnan(recall) else f"{recall:.1f}" for recall in recalls],
                        fontsize=0.9 * size, padding=2)
        right.set_yticks(range(classes), short, fontsize=size)
        right.set(xlim=(0, 118), ylim=(classes - 0.5, -0.5), xticks=range(0, 101, 20))
    else:
        right.hist(recalls[~np.isnan(recalls)], bins=20, range=(0, 100), color=COLOURS[0])
        worst = [f"{recalls[label]:.1f}  {short[label]}" for label in np.argsort(recalls, kind="stable")[:10]]
        right.text(0.03, 0.99, "\n".join(["lowest:", *worst]), va="top", fontsize=8, transform=right.transAxes)
        right.set_ylabel("classes")
    right.set(xlabel="recall (%)", title=f"each class; mean {np.nanmean(recalls):.2f} %")
    right.spines[["top", "right"]].set_visible(False)
    return figure


def write_tables(matrix: np.ndarray, names: list[str], folder: Path) -> None:
    """Writes ``confusion.csv`` and ``classes.csv`` into a folder, which is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "confusion.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    hits, images, taken = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    errors = matrix - np.diag(hits)
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow("class images correct recall precision f1 predicted most_taken_for".split())
        for i, (name, *shares) in enumerate(zip(names, *scores(matrix), strict=True)):
            most_taken_for = names[errors[i].argmax()] if errors[i].any() else ""
            writer.writerow([name, images[i], hits[i], *(f"{share:.3f}" for share in shares), taken[i], most_taken_for])


def draw_mistakes(mistakes: list, report: Path, data_path: str | None):
    """A contact sheet of the most confident mistakes, each image under its true class and over the predicted one. The
    evaluation's ``eval.json`` says which images it read; ``data_path`` names another folder for them."""
    from config import from_dict  # the data's code imports PyTorch
    from data import build_val_loader

    if not report.is_file():
        raise MissingFileError(f"--sheet: {report}, which says what images were evaluated, does not exist")
    try:
        values = json.loads(report.read_text(encoding="utf-8"))["config"]
        values["DATA"] |= {"DATA_PATH": data_path} if data_path else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{report} is not an evaluation's report ({error!r:.80}); move it away") from error
    dataset = build_val_loader(from_dict(values, str(report))).dataset
    shown = sorted(mistakes, reverse=True)[:_SHOWN]
    beyond = [index for _, index, *_ in shown if not 0 <= index < len(dataset)]
    if beyond:
        raise InputError(f"--sheet: image {beyond[0]} was evaluated, but the data set has {len(dataset)}; is "
                         "--data-path right?")
    return draw_sheet([(f"true: {target}", thumbnail(dataset[index][0]), [(prediction, probability)])
                       for probability, index, target, prediction in shown])


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    args = PARSER.parse_args(argv)
    path = args.predictions / "predictions.csv" if args.predictions.is_dir() else args.predictions
    folder = args.output or path.parent
    if args.sheet:
        check_sheet(args.sheet)
    matrix, names, mistakes = read_predictions(path)
    try:
        write_tables(matrix, names, folder)
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror}); choose another --output") from error
    save_figure(draw_confusion(matrix, names), folder / "confusion.png")
    recalls, _, f1 = scores(matrix)
    print(f"{matrix.trace()} of {matrix.sum()} images correct: top-1 {100 * matrix.trace() / matrix.sum():.3f}, mean "
          f"recall {np.nanmean(recalls):.3f}, mean F1 {np.nanmean(f1):.3f}")
    for target, prediction, images in most_confused(matrix):
        print(f"  {names[target]} classified as {names[prediction]}: {images} of {matrix[target].sum()}")
    print(f"written to {folder}: confusion.csv, classes.csv, confusion.png")
    if args.sheet and mistakes:
        draw_mistakes(mistakes, path.with_name("eval.json"), args.data_path).save(args.sheet, optimize=True)
        print(f"{min(len(mistakes), _SHOWN)} of {len(mistakes)} mistakes drawn to {args.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
