"""Curves: what is drawn is what ``metrics.jsonl`` holds."""

import json
import math

import pytest
from PIL import Image

import plots
from logger import MetricsWriter
from tests.processes import run_interpreter
from utils import InputError


def train(step, epoch, loss=1.0, lr=0.1):
    return {"kind": "train", "step": step, "epoch": epoch, "epochs": step / 6, "loss": loss, "lr": lr}


def evaluation(step, epoch, acc1, loss=0.5, kind="eval"):
    return {"kind": kind, "step": step, "epoch": epoch, "epochs": epoch + 1, "acc1": acc1, "acc5": 100.0,
            "loss": loss, "images": 9}


RUN = [train(3, 0, 2.0, 0.1), train(6, 0, 1.5, 0.2),
       evaluation(6, 0, 40.0, 1.4), evaluation(6, 0, 30.0, 1.6, "eval_ema"),
       train(9, 1, None, 0.3), train(12, 1, 1.0, 0.2), evaluation(12, 1, 70.0, 0.8),
       evaluation(12, 1, 60.0, 0.9, "eval_ema"), train(15, 2, 0.5, 0.1)]


def write(path, records, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + end)
    return path


def drawn(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


def run_legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_hold_the_records_figures(tmp_path):
    loss, accuracy, rate = plots.draw_curves({"run": plots.read_metrics(write(tmp_path / "metrics.jsonl", RUN))}).axes
    (x, y), validation, averaged = drawn(loss)
    assert x == [0.5, 1, 1.5, 2, 2.5]  # six updates an epoch; the third epoch has not ended
    assert y[:2] == [2.0, 1.5] and math.isnan(y[2]) and y[3:] == [1.0, 0.5]
    assert validation == ([1, 2], [1.4, 0.8]) and averaged == ([1, 2], [1.6, 0.9])
    assert drawn(accuracy) == [([1, 2], [40.0, 70.0]), ([1, 2], [30.0, 60.0])]
    assert drawn(rate) == [([0.5, 1, 1.5, 2, 2.5], [0.1, 0.2, 0.3, 0.2, 0.1])]
    assert run_legend(loss.figure) == ["run: best 70.00 %"]  # of the network, better than its average
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "training", "validation", "validation, averaged weights"]


def test_the_seeds_of_a_network_share_a_colour():
    """The legend has a line for each network: mean and sample deviation over its seeds."""
    runs = {f"{net}/{seed}": [evaluation(6, 0, best)] for net, seed, best in (
        ("a", 0, 60.0), ("a", 1, 64.0), ("a", 2, 62.0), ("b", 0, 50.0))}
    figure = plots.draw_curves(runs, {name: name[0] for name in runs})
    assert run_legend(figure) == ["a: best 62.00 ± 2.00 %", "b: best 50.00 %"]
    colours = [line.get_color() for line in figure.axes[1].lines]
    assert colours[0] == colours[1] == colours[2] != colours[3]
    assert len({line.get_color() for line in plots.draw_curves(runs).axes[1].lines}) == 4


def test_runs_of_other_batch_sizes_share_the_axis():
    twice = [record | {"step": 2 * record["step"]} for record in RUN]
    loss, accuracy, _ = plots.draw_curves({"a": RUN, "b": twice}).axes
    assert drawn(loss)[0][0] == drawn(loss)[3][0] and drawn(accuracy)[0] == drawn(accuracy)[2]
    colours = [line.get_color() for line in loss.lines]
    assert colours[0] == colours[1] == colours[2] != colours[3] == colours[5]


def test_a_run_resumed_with_a_larger_batch_goes_on_along_the_axis(tmp_path):
    """Six updates an epoch, then three: the steps fall back from 9 to 6, the epochs go on."""
    writer = MetricsWriter(tmp_path, epochs=0, step=0)
    for record in [*RUN[:3], train(9, 1)]:
        writer.write(**record)
    writer.close()
    writer = MetricsWriter(tmp_path, epochs=1.5, step=4)
    writer.write(**train(5, 1) | {"epochs": 1 + 2 / 3})
    writer.write(**evaluation(6, 1, 50.0))
    writer.close()
    loss, accuracy, _ = plots.draw_curves({"run": plots.read_metrics(tmp_path)}).axes
    assert drawn(loss)[0][0] == [0.5, 1, 1.5, 1 + 2 / 3]
    assert drawn(accuracy)[0] == ([1, 2], [40.0, 50.0])


def test_a_run_resumed_in_the_middle_has_each_step_once(tmp_path):
    """Broken off after update 9 of epoch 1, resumed from the checkpoint of update 6, which drops what came after."""
    writer = MetricsWriter(tmp_path, epochs=0, step=0)
    before = [*RUN[:4], train(9, 1, 3.0)]
    for record in before:
        writer.write(**record)
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')  # killed while writing
    assert plots.read_metrics(tmp_path) == before
    writer = MetricsWriter(tmp_path, epochs=1, step=6)
    for record in RUN[4:]:
        writer.write(**(record | {"loss": 7.0}))
    writer.close()
    epochs, losses = plots.select(plots.read_metrics(tmp_path), "train", "loss")
    assert epochs.tolist() == [0.5, 1, 1.5, 2, 2.5] and losses.tolist() == [2.0, 1.5, 7.0, 7.0, 7.0]


def test_best_accuracy():
    assert plots.best_accuracy(RUN) == (70.0, 1)  # of the network; the average's is 60
    assert plots.best_accuracy([record for record in RUN if record["kind"] != "eval"]) == (60.0, 1)
    assert math.isnan(plots.best_accuracy(RUN[:2])[0])


def test_runs_are_named_by_what_tells_them_apart():
    assert plots.run_names(["out/nano/seed0", "out/nano/seed1/metrics.jsonl"]) == ["seed0", "seed1"]
    assert plots.run_names(["out/nano/run", "out/tiny/run"]) == ["nano/run", "tiny/run"]
    assert plots.run_names(["a/nano/run", "b/nano/run", "b/nano/run"]) == ["a/nano/run", "b/nano/run", "b/nano/run"]


@pytest.mark.parametrize("line", [
    "not json", "[]", "3", "{}", '{"kind": "train"}', '{"kind": "test", "step": 1, "epoch": 0}',
    '{"kind": "train", "step": null, "epoch": 0, "loss": 1, "lr": 1}',
    '{"kind": "eval", "step": 1, "epoch": 0, "epochs": 1, "loss": 1}',
    '{"kind": "eval", "step": 1, "epoch": 0, "epochs": 1, "loss": 1, "acc1": "high"}', "\x00\x00", "[" * 100_000,
    '{"kind": "train", "step": 1, "epoch": 0, "epochs": 1, "loss": Infinity, "lr": 1}',
    '{"kind": 3, "step": 1, "epoch": 0, "epochs": 1}',
    '{"kind": "train", "step": 1, "epoch": 0, "epochs": 1, "loss": 1' + "0" * 400 + ', "lr": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([json.dumps(RUN[0]), line, json.dumps(RUN[1])]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 2 is not a record"):
        plots.read_metrics(path)


def test_figures_of_another_kind_are_not_damage(tmp_path):
    """A researcher's own metric."""
    own = {"kind": "eval_sketch", "step": 6, "epoch": 0, "epochs": 1, "map": 3.5}
    assert plots.read_metrics(write(tmp_path / "metrics.jsonl", [RUN[0], own])) == [RUN[0], own]


def test_any_name_can_be_drawn(tmp_path):
    """Dollar signs are not mathematics; what a terminal or a font cannot show is escaped."""
    names = ["$x_{$", "a\x1b[31m\nb", "caf\udce9", "%s {0} \\frac"]
    runs = {name: RUN for name in plots.run_names([tmp_path / name for name in names])}
    plots.save_figure(plots.draw_curves(runs), tmp_path / "a.png")
    assert list(runs)[:3] == ["$x_{$", "a\\x1b[31m\\nb", "caf\\udce9"]
    plots.draw_sheet([(name, Image.new("RGB", (9, 9)), [(name, 0.5)]) for name in names])


def test_a_notebook_s_backend_does_not_matter():
    result = run_interpreter(["-c", "import logger, plots; plots.draw_curves({'a': []})"],
                             MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert result.returncode == 0, result.stderr


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist; name a run's folder"):
        plots.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no records yet"):
        plots.read_metrics(tmp_path)


def test_saving(tmp_path):
    figure = plots.draw_curves({"run": RUN})
    plots.save_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1575, 510) and image.mode == "P"
    plots.save_figure(figure, tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()[:500]
    with pytest.raises(ValueError, match=r"a\.xyz \(.*xyz"):
        plots.save_figure(figure, tmp_path / "a.xyz")
    with pytest.raises(InputError, match="cannot write .*gone"):
        plots.save_figure(figure, tmp_path / "gone" / "a.png")
