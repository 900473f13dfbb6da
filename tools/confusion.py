"""Confusion matrix and accuracy of each class, from the predictions that an evaluation wrote.

    python main.py --eval --cfg configs/X.yaml --data-path DIR --resume CKPT --opts TEST.PREDICTIONS True
    python tools/confusion.py output/X/default

Writes into the same folder:
  confusion.csv   number of images of each true class (row) predicted as each class (column)
  classes.csv     per class: images, correct ones, accuracy, images predicted as it, precision, most frequent error
  confusion.png   the matrix as shares of each row, and the accuracy of each class
and prints the pairs of classes that are confused most.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm

sys.path.insert(0, str(Path(__file__).parents[1]))

from plots import COLOURS, new_figure, save_figure
from utils import InputError, MissingFileError, csv_cell, one_line_errors

_COLUMNS = ("target", "prediction", "target_label", "prediction_label")
_NUMBERED = 20  # most classes for which the numbers fit into the cells
_MOST = 30_000  # classes; their matrix takes 7 GB
_NAMED = 60  # most classes for which the names fit beside the matrix
_CELLS = 250  # most cells per side of the figure; beyond it several classes share one


def read_predictions(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """The confusion matrix, (true class, predicted class) -> images, and the names of the classes by label.

    Classes after the last one that occurs, as the true or the predicted class, are not included.

    Args:
        path: ``predictions.csv`` or the folder that holds it.

    Raises:
        MissingFileError: there is no such file.
        InputError: the file holds no predictions, or a line that is not one; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "predictions.csv"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; main.py --eval writes it with --opts TEST.PREDICTIONS True")
    labels, names = [], {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise InputError(f"{path} has no column {' or '.join(missing)}; write it again with main.py --eval "
                             "--opts TEST.PREDICTIONS True")
        try:
            for row in rows:
                pair = int(row["target_label"]), int(row["prediction_label"])
                for label, name in zip(pair, (row["target"], row["prediction"]), strict=True):
                    if not 0 <= label < _MOST or names.setdefault(label, name) != name:
                        raise ValueError
                labels.append(pair)
        except (ValueError, TypeError, csv.Error):
            raise InputError(f"{path} is damaged: line {rows.line_num} is not a prediction; write it again with "
                             "main.py --eval --opts TEST.PREDICTIONS True") from None
    if not labels:
        raise InputError(f"{path} holds no predictions")
    classes = max(names) + 1
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, tuple(np.transpose(labels)), 1)
    return matrix, [names.get(label, str(label)) for label in range(classes)]


def class_accuracies(matrix: np.ndarray) -> np.ndarray:
    """The percentage of each class's images that were classified correctly; nan for a class without images."""
    return _percent(matrix.diagonal(), matrix.sum(axis=1))


def most_confused(matrix: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The ``count`` most frequent errors as (true class, predicted class, images), the most frequent first."""
    errors = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-errors, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(int(target), int(prediction), int(errors[target, prediction]))
            for target, prediction in pairs if errors[target, prediction]]


def draw_confusion(matrix: np.ndarray, names: list[str]):
    """The matrix, darker for a larger share of the row, beside the accuracy of each class.

    Numbers and names are written if they fit. With more than 250 classes, several share a cell, which shows the largest
    of their shares, so that every confusion stays visible.

    Returns:
        A matplotlib Figure.
    """
    classes, accuracies = len(matrix), class_accuracies(matrix)
    figure, (left, right) = new_figure(1, 2, size=(10, 5.4), width_ratios=(1.7, 1))
    step = -(-classes // _CELLS)
    cells = _largest_of_blocks(_percent(matrix, matrix.sum(axis=1, keepdims=True)), step)
    edge = len(cells) * step - 0.5
    image = left.imshow(cells, cmap="Blues", norm=PowerNorm(0.5, 0, 100),  # the square root, to show rare confusions
                        interpolation="nearest", aspect="auto", extent=(-0.5, edge, edge, -0.5))
    label = "% of the true class" + (f", the largest of {step} x {step} classes" if step > 1 else "")
    figure.colorbar(image, ax=left, label=label, ticks=(0, 1, 5, 10, 25, 50, 100))
    left.set_xlabel("predicted class")
    left.set_ylabel("true class")
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    total = matrix.sum()
    left.set_title(f"{100 * matrix.trace() / total:.2f} % of {total} images correct")
    if classes <= _NUMBERED:
        for target, prediction in np.argwhere(matrix):
            share = matrix[target, prediction] / matrix[target].sum()
            left.text(prediction, target, matrix[target, prediction], ha="center", va="center",
                      fontsize=8 if classes <= 12 else 6, color="white" if share > 0.3 else "black")
    if classes <= _NAMED:
        size = min(9, 300 / classes)
        left.set_xticks(range(classes), short, rotation=90 if max(map(len, short)) > 2 else 0, fontsize=size)
        left.set_yticks(range(classes), short, fontsize=size)
        right.barh(range(classes), np.nan_to_num(accuracies), color=COLOURS[0])
        right.set_yticks(range(classes), short, fontsize=size)
        right.set_ylim(edge, -0.5)
        for label, accuracy in enumerate(accuracies):
            right.text(1, label, "no images" if np.isnan(accuracy) else f"{accuracy:.1f}", va="center_baseline",
                       fontsize=0.9 * size, color="white" if accuracy > 20 else "black")
        right.set_xlim(0, 100)
        right.set_xlabel("accuracy (%)")
    else:
        right.hist(accuracies[~np.isnan(accuracies)], bins=20, range=(0, 100), color=COLOURS[0])
        worst = [f"{accuracies[label]:.1f}  {short[label]}" for label in np.argsort(accuracies, kind="stable")[:10]]
        right.text(0.03, 0.99, "\n".join(["lowest:", *worst]), va="top", fontsize=8, transform=right.transAxes)
        right.set_xlabel("accuracy (%)")
        right.set_ylabel("classes")
    right.set_title(f"each class; mean {np.nanmean(accuracies):.2f} %")
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
    accuracies, precisions = class_accuracies(matrix), _percent(hits, taken)
    errors = matrix - np.diag(hits)
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "correct", "accuracy", "predicted", "precision", "most_taken_for"])
        for i, name in enumerate(names):
            most_taken_for = names[errors[i].argmax()] if errors[i].any() else ""
            writer.writerow([name, images[i], hits[i], f"{accuracies[i]:.3f}", taken[i], f"{precisions[i]:.3f}",
                             most_taken_for])


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(part.shape, np.nan), where=np.broadcast_to(whole > 0, part.shape))


def _largest_of_blocks(shares: np.ndarray, step: int) -> np.ndarray:
    """The largest share in each block of ``step`` by ``step`` cells."""
    padding = -len(shares) % step
    blocks = np.pad(np.nan_to_num(shares), (0, padding)).reshape(-1, step, (len(shares) + padding) // step, step)
    return blocks.max(axis=(1, 3))


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", metavar="PREDICTIONS",
                        help="predictions.csv, or the output folder that holds it")
    parser.add_argument("--output", metavar="DIR", help="folder for the results; default: that of predictions.csv")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="confused pairs to print; default: 10")
    args = parser.parse_args(argv)
    matrix, names = read_predictions(args.predictions)
    names = [csv_cell(name) for name in names]
    source = Path(args.predictions)
    folder = Path(args.output) if args.output else source if source.is_dir() else source.parent
    try:
        write_tables(matrix, names, folder)
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error.strerror}); choose another --output") from error
    save_figure(draw_confusion(matrix, names), folder / "confusion.png")
    print(f"{matrix.trace()} of {matrix.sum()} images correct: top-1 {100 * matrix.trace() / matrix.sum():.3f}")
    for target, prediction, images in most_confused(matrix, args.pairs):
        print(f"  {names[target]} classified as {names[prediction]}: {images} of {matrix[target].sum()}")
    print(f"written to {folder}: confusion.csv, classes.csv, confusion.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
