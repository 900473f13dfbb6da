"""The confusion matrix against scikit-learn's and an evaluation's accuracy; the tables; the picture's contents."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import checkpoint
import main
from inference import predicts_by_average
from tests.helpers import arguments, digits_folder, few_digits, folder
from tools import confusion

HEADER = "index,image,target,prediction,probability,target_label,prediction_label\n"


def write(path, targets, predictions, names):
    rows = [f"7,,{names[t]},{names[p]},0.5,{t},{p}\n" for t, p in zip(targets, predictions, strict=True)]
    path.write_text(HEADER + "".join(rows))
    return path


def random_predictions(path, classes, images, seed=0):
    """Half of the predictions right; the last class is never seen."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, classes - 1, images)
    predictions = np.where(generator.random(images) < 0.5, targets, generator.integers(0, classes, images))
    return write(path, targets, predictions, [f"class {i}" for i in range(classes)]), targets, predictions


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_matrix_equals_scikit_learns(tmp_path):
    path, targets, predictions = random_predictions(tmp_path / "predictions.csv", 12, 500)
    matrix, names, mistakes = confusion.read_predictions(path)
    assert (matrix == confusion_matrix(targets, predictions, labels=range(12))).all()
    assert names == [f"class {i}" for i in range(12)]
    precision, recall, f1, _ = precision_recall_fscore_support(targets, predictions, labels=range(12), zero_division=0)
    for found, expected in zip(confusion.scores(matrix), (recall, precision, f1), strict=True):
        assert found[:11] == pytest.approx(100 * expected[:11], rel=1e-12)
    assert math.isnan(confusion.scores(matrix)[0][11])
    assert len(mistakes) == (targets != predictions).sum() and mistakes[0][:2] == (0.5, 7)


def test_tables_and_printed_pairs(tmp_path, capsys):
    path = write(tmp_path / "predictions.csv", [0, 0, 0, 0, 1, 1, 3], [0, 2, 2, 1, 1, 0, 3], "abcd")
    confusion.main([str(path), "--output", str(tmp_path / "out")])
    assert read_csv(tmp_path / "out" / "confusion.csv") == [
        ["true class", *"abcd"], ["a", *"1120"], ["b", *"1100"], ["c", *"0000"], ["d", *"0001"]]
    assert read_csv(tmp_path / "out" / "classes.csv") == [
        ["class", "images", "correct", "recall", "precision", "f1", "predicted", "most_taken_for"],
        ["a", "4", "1", "25.000", "50.000", "33.333", "2", "c"],
        ["b", "2", "1", "50.000", "50.000", "50.000", "2", "a"],
        ["c", "0", "0", "nan", "0.000", "0.000", "2", ""],
        ["d", "1", "1", "100.000", "100.000", "100.000", "1", ""]]
    assert capsys.readouterr().out.splitlines()[:3] == [
        "3 of 7 images correct: top-1 42.857, mean recall 58.333, mean F1 45.833", "  a classified as c: 2 of 4",
        "  a classified as b: 1 of 4"]


def test_most_confused_leaves_out_what_was_never_confused():
    matrix = np.array([[5, 0, 2], [3, 5, 0], [0, 0, 9]])
    assert confusion.most_confused(matrix, 9) == [(1, 0, 3), (0, 2, 2)]


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The folder of an evaluation of the trained network."""
    output = tmp_path_factory.mktemp("evaluated")
    flags = ["--eval", "--resume", str(folder(trained) / "best.pth")]
    assert main.main(arguments(output, "TEST.PREDICTIONS", True, flags=flags)) == 0
    return folder(output)


def test_an_evaluation_s_predictions_give_its_accuracy(evaluated):
    """From the training to the table; digits' classes are in the order of their labels."""
    matrix, names, mistakes = confusion.read_predictions(evaluated / "predictions.csv")
    report = json.loads((evaluated / "eval.json").read_text())
    kind = "eval_ema" if predicts_by_average(checkpoint.load_file(report["checkpoint"])) else "eval"
    report = report[kind]
    assert matrix.sum() == report["images"] == 40 and len(mistakes) == 40 - matrix.trace()
    assert 100 * matrix.trace() / 40 == pytest.approx(report["acc1"], rel=1e-12)
    assert names == [str(digit) for digit in range(len(names))]


def test_the_mistakes_are_shown(evaluated, tmp_path, monkeypatch, capsys):
    """The most confident first, each with its image, its true class and the predicted one."""
    drawn = []
    monkeypatch.setattr(confusion, "draw_sheet", lambda cells: drawn.extend(cells) or Image.new("RGB", (9, 9)))
    assert confusion.main([str(evaluated), "--output", str(tmp_path), "--sheet", str(tmp_path / "sheet.png")]) == 0
    matrix, _, mistakes = confusion.read_predictions(evaluated / "predictions.csv")
    shown = sorted(mistakes, reverse=True)
    assert f"{len(shown)} of {len(shown)} mistakes drawn to" in capsys.readouterr().out
    assert [(title, classes) for title, _, classes in drawn] == [
        (f"true: {target}", [(prediction, probability)]) for probability, _, target, prediction in shown]
    rows = read_csv(evaluated / "predictions.csv")
    image = Image.open(few_digits() / "val" / rows[1 + shown[0][1]][1])
    assert drawn[0][1].resize((8, 8), Image.Resampling.BOX).tobytes() == image.convert("RGB").tobytes()


def test_a_sheet_of_other_images_is_refused(evaluated, tmp_path, capsys):
    digits_folder(tmp_path, train=10, val=10)
    argv = [str(evaluated), "--output", str(tmp_path), "--sheet", str(tmp_path / "s.png")]
    assert confusion.main([*argv, "--data-path", str(tmp_path)]) == 2
    assert "but the data set has 10; is --data-path right?" in capsys.readouterr().err
    shutil.copy(evaluated / "predictions.csv", tmp_path)
    assert confusion.main([str(tmp_path), *argv[1:]]) == 2
    assert "eval.json, which says what images were evaluated, does not exist" in capsys.readouterr().err
    assert confusion.main([*argv[:-1], str(tmp_path / "s.gif")]) == 2
    assert "the sheet is a PNG" in capsys.readouterr().err


def test_picture_of_ten_classes_has_every_number_and_name(tmp_path):
    path, _, _ = random_predictions(tmp_path / "predictions.csv", 10, 500)
    matrix, names, _ = confusion.read_predictions(path)
    left, right, _ = confusion.draw_confusion(matrix, names).axes
    numbers = {text.get_position()[::-1]: int(text.get_text()) for text in left.texts}
    assert numbers == {(t, p): matrix[t, p] for t, p in np.argwhere(matrix)}
    assert [label.get_text() for label in left.get_yticklabels()] == names
    shares = 100 * matrix[:9] / matrix[:9].sum(axis=1, keepdims=True)
    assert np.allclose(left.images[0].get_array()[:9], shares)
    assert [bar.get_width() for bar in right.patches][:9] == pytest.approx(list(shares.diagonal()))
    assert right.texts[9].get_text() == "no images"


def test_picture_of_many_classes_has_a_histogram_of_their_recalls(tmp_path):
    path, _, _ = random_predictions(tmp_path / "predictions.csv", 100, 5000)
    matrix, names, _ = confusion.read_predictions(path)
    left, right, _ = confusion.draw_confusion(matrix, names).axes
    assert left.images[0].get_array().shape == (100, 100) and not left.texts
    assert sum(bar.get_height() for bar in right.patches) == (matrix.sum(axis=1) > 0).sum()


def test_picture_is_drawn(tmp_path):
    confusion.main([str(random_predictions(tmp_path / "predictions.csv", 30, 300)[0])])
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.size == (1500, 810)


@pytest.mark.parametrize(
    "line", ["1,,b,a,0.5,1", "1,,b,a,0.5,x,0", "1,,b,a,0.5,-1,0", "1,,wrong,a,0.5,1,0", "\x00", "half",
             "1,,b,c,0.5,1,1000000000", "1,,b,a,high,1,0"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = write(tmp_path / "predictions.csv", [0, 1], [0, 1], "ab")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"predictions\.csv is damaged: line 4 is not a prediction"):
        confusion.read_predictions(path)


def test_errors_are_one_line(tmp_path, capsys):
    good = write(tmp_path / "predictions.csv", [0, 1], [0, 1], "ab")
    (tmp_path / "empty").write_text("")
    (tmp_path / "header").write_text(HEADER)
    (tmp_path / "old").write_text("index,image,target,prediction,probability\n0,,a,a,0.5\n")
    for argv, message in [
        ([tmp_path / "gone"], "gone does not exist; main.py --eval writes it with --opts TEST.PREDICTIONS True"),
        ([tmp_path / "empty"], "has no column index or target"),
        ([tmp_path / "old"], "has no column target_label or prediction_label; write it again"),
        ([tmp_path / "header"], "holds no predictions"),
        ([good, "--output", good], "cannot write into"),
    ]:
        assert confusion.main([str(word) for word in argv]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("confusion.py: ") and error.count("\n") == 1
