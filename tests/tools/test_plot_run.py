"""The command line of ``tools/plot_run.py``; what it draws is tested in ``tests/test_plots.py``."""

import json

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from config import load_config, to_dict
from tests.helpers import DIGITS
from tests.processes import ROOT, run
from tools import plot_run


def record(step, epoch, acc1):
    figures = {"acc1": acc1, "acc5": 100.0, "loss": 1.0}
    return json.dumps({"kind": "eval", "step": step, "epoch": epoch, "epochs": epoch + 1, **figures}) + "\n"


def write(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def failure(capsys, argv) -> str:
    """The one line with which the tool refuses a command line."""
    assert plot_run.main([str(word) for word in argv]) == 2
    line = capsys.readouterr().err
    assert line.startswith("plot_run.py: ") and line.count("\n") == 1
    return line


def test_two_seeds(tmp_path):
    """In a process of its own, which needs no PyTorch."""
    folders = [write(tmp_path / f"seed{i}", record(5, 0, 60 + i), record(10, 1, 50)) for i in range(2)]
    result = run([ROOT / "tools" / "plot_run.py", *folders, "--figure", tmp_path / "both.png"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "seed0: 10 updates, best top-1 60.000 in epoch 0", "seed1: 10 updates, best top-1 61.000 in epoch 0",
        f"drawn to {tmp_path / 'both.png'}"]
    with Image.open(tmp_path / "both.png") as image:
        assert len(image.convert("RGB").getcolors(2**20)) > 100


@pytest.fixture
def seeds(tmp_path):
    """Two seeds of each of two networks, with their configs."""
    folders = [write(tmp_path / net / f"seed{i}", record(5, 0, 60 + i)) for net in "ab" for i in range(2)]
    for folder in folders:
        opts = ["SEED", folder.name[-1], "TAG", folder.name, "MODEL.STRIP_MLP.STRIP_WIDTH", 1 + 2 * "ab".index(
            folder.parent.name)]
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(load_config(DIGITS, opts))))
    return folders


def test_runs_by_folder(seeds, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_run, "draw_curves", lambda runs, groups: drawn.append(groups) or Figure())
    plot_run.main([*map(str, seeds[:3]), str(seeds[3] / "metrics.jsonl"), "--by-folder", "--figure",
                   str(tmp_path / "x.png")])
    assert drawn == [{"a/seed0": "a", "a/seed1": "a", "b/seed0": "b", "b/seed1": "b"}]


def test_other_networks_of_a_folder_are_not_averaged(seeds, tmp_path, capsys):
    seeds[2].rename(tmp_path / "a" / "seed2")
    message = failure(capsys, [*seeds[:2], tmp_path / "a" / "seed2", "--by-folder", "--figure", tmp_path / "x.png"])
    assert "--by-folder: seed0 and seed2 differ in MODEL.STRIP_MLP.STRIP_WIDTH: 1 and 3" in message
    assert not (tmp_path / "x.png").exists()


def test_folders_of_one_name_are_kept_apart(seeds, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "b").rename(tmp_path / "other" / "a")
    folders = {"one": seeds[0], "two": tmp_path / "other" / "a" / "seed0"}
    groups = plot_run.groups_by_folder(folders)
    assert groups["one"].endswith("/a") and groups["two"] == "other/a"


def test_errors_are_one_line(tmp_path, capsys):
    good, empty = write(tmp_path / "good", record(5, 0, 60)), write(tmp_path / "empty")
    for argv, message in [
        ([tmp_path], "does not exist; name a run's folder"),
        ([tmp_path / "gone"], "gone does not exist"),
        ([empty], "holds no records yet"),
        ([good, empty], "holds no records yet"),
        ([good, "--figure", tmp_path], "cannot write"),
        ([good, "--figure", tmp_path / "gone" / "x.png"], "cannot write"),
    ]:
        assert message in failure(capsys, argv)


def test_a_checkpoint_is_no_run(tmp_path, capsys):
    path = write(tmp_path / "run", "") / "best.pth"
    path.write_bytes(b"PK binary")
    assert f"{path} is a checkpoint; name the run's folder, {path.parent}" in failure(capsys, [path])
