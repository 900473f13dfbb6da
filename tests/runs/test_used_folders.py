"""What a run makes of a folder that another run has used, or is using."""

import os
import re
import shutil
import sys
import types

import pytest
import torch

import checkpoint
import engine
import main
from data.datasets import read_digits
from logger import MetricsWriter, open_log, start_wandb
from resume_checks import check_run
from tests.helpers import arguments, differences, few_digits, folder
from utils import InputError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output folder of a training of one epoch, stopped by a schedule of two."""
    output = tmp_path_factory.mktemp("trained")
    assert main.main(arguments(output, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)) == 0
    return output


def contents(run_folder):
    return {path.name: path.read_bytes() for path in run_folder.glob("*") if path.suffix in (".pth", ".jsonl", ".yaml")}


def test_a_new_run_is_not_mixed_with_an_old_one(trained, capsys):
    before = contents(folder(trained))
    assert main.main(arguments(trained, "TRAIN.AUTO_RESUME", False)) == 2
    assert "already holds the checkpoints of a run" in capsys.readouterr().out
    assert contents(folder(trained)) == before


def test_a_resume_with_another_batch_on_a_full_disk_keeps_the_only_checkpoint(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    options = ("TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "DATA.BATCH_SIZE", 80)
    assert main.main(arguments(tmp_path, *options, flags=["--allow-changes"])) == 2
    assert "free space and rerun the same command" in capsys.readouterr().out
    assert [path.name for path in checkpoint.list_checkpoints(folder(tmp_path))] == ["ckpt_step_00000007.pth"]


WRITERS = {
    ".lock": checkpoint.lock_folder, "log_rank0.txt": open_log,
    "tensorboard": lambda path: MetricsWriter(path, 0, 0),
    "wandb_id.txt": lambda path: start_wandb("strips", "run", {}, path),
    "wandb": lambda path: start_wandb("strips", "run", {}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_run_writes_through_no_link_in_its_folder(name, tmp_path, monkeypatch):
    """Nor into a folder that a link leads to."""
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    is_folder = name in ("tensorboard", "wandb")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / ("" if is_folder else "file"))
    with pytest.raises(InputError, match=f"{name} is a link"):
        WRITERS[name](tmp_path / "run")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_an_odd_id_of_weights_and_biases_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    (tmp_path / "wandb_id.txt").write_bytes(b"../\xff")
    with pytest.raises(InputError, match=r"wandb_id\.txt holds '\.\./"):
        start_wandb("strips", "run", {}, tmp_path)


@pytest.mark.parametrize(("entry", "value", "message"), [
    ("config", 3, "its config is 3"), ("config", {"SEED": torch.zeros(3)}, "its config: SEED takes int"),
    ("config", {"TRAIN": {3: 4}}, "its config: unknown config key TRAIN.3"),
    ("config", {"TAG": "x" * 5000}, "TAG is 'xxx"),
    ("changes", 3, "its changes is 3"), ("changes", [3], "its changes hold 3"),
    ("changes", [{"step": 1, "keys": 3}], "its changes hold"),
    ("changes", [{"step": torch.zeros(1), "keys": {}}], "its changes hold"),
    ("layout", [], "its layout is []"), ("epoch", "2", "its epoch is '2'"), ("step", None, "its step is None"),
    ("max_accuracy", torch.zeros(2), "its max_accuracy is tensor"),
])
def test_what_is_read_of_a_run_before_it_is_built(entry, value, message, trained, tmp_path):
    """Each was once a traceback, for it was read before the check of what is restored."""
    content = torch.load(folder(trained) / "best.pth", weights_only=True)
    check_run(content)
    check_run({"model": content["model"], "config": value})  # of no training
    with pytest.raises(InputError, match=re.escape(message)):
        check_run(content | {entry: value})
    if entry in ("epoch", "step", "max_accuracy"):
        with pytest.raises(InputError, match=f"it lacks {entry}"):
            check_run({key: item for key, item in content.items() if key != entry})


def test_a_run_s_odd_checkpoint_is_one_line(trained, tmp_path, capsys):
    folder(tmp_path).mkdir(parents=True)
    content = torch.load(folder(trained) / "best.pth", weights_only=True)
    torch.save(content | {"config": 3}, folder(tmp_path) / "ckpt_step_00000014.pth")
    assert main.main(arguments(tmp_path)) == 2
    assert "ckpt_step_00000014.pth: its config is 3" in capsys.readouterr().out


def test_a_run_at_0_percent_has_a_best_checkpoint(tmp_path, monkeypatch):
    result = {"acc1": 0.0, "acc5": 0.0, "loss": 9.0, "images": 360}
    monkeypatch.setattr(engine, "evaluate", lambda *_: result)
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)) == 0
    assert checkpoint.load_file(folder(tmp_path) / "best.pth")["max_accuracy"] == 0


def test_an_evaluation_keeps_other_runs_out_of_its_folder(trained, monkeypatch):
    """Asked from another process, since the lock belongs to the one that evaluates."""
    locked, original = [], engine.evaluate

    def evaluate(*arguments):
        child = os.fork()
        if child == 0:
            try:
                checkpoint.lock_folder(folder(trained))
            except InputError:
                os._exit(3)
            os._exit(0)
        locked.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return original(*arguments)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    assert main.main([*arguments(trained), "--eval"]) == 0
    assert locked == [3, 3]  # the network and its average


def test_an_evaluation_on_other_classes_is_refused(trained, tmp_path, monkeypatch, capsys):
    content = checkpoint.load_file(folder(trained) / "best.pth") | {"classes": list("0123456798")}
    swapped = str(tmp_path / "swapped.pth")
    checkpoint.save_file(content, swapped)
    monkeypatch.setattr(engine, "evaluate", lambda *_: pytest.fail("evaluated"))
    images, labels, _ = read_digits("val")
    names = "zero one two three four five six seven eight nine".split()
    monkeypatch.setattr("data.datasets.read_digits", lambda split: (images, labels, names))
    assert main.main(arguments(tmp_path, "DATA.DATASET", "digits", flags=["--eval", "--resume", swapped])) == 2
    assert "label 0 is '0' in the checkpoint and 'zero' in the data set" in capsys.readouterr().out


def test_a_run_goes_on_only_with_its_own_data(trained, tmp_path, capsys):
    """A renamed class folder moves every label after it."""
    shutil.copytree(trained, tmp_path / "out")
    data = tmp_path / "data"
    shutil.copytree(few_digits(), data)
    longer = arguments(tmp_path / "out", "TRAIN.EPOCHS", 3, "DATA.DATA_PATH", data, flags=["--allow-changes"])
    before = checkpoint.load_file(folder(tmp_path / "out") / "best.pth")
    for split in ("train", "val"):
        (data / split / "0").rename(data / split / "zero")
    assert main.main(longer) == 2
    assert "was trained on other classes: label 0 was '0' and is '1' now." in capsys.readouterr().out
    for split in ("train", "val"):
        (data / split / "zero").rename(data / split / "0")
    image = next((data / "train" / "3").iterdir())
    image.rename(image.with_name("another.png"))
    assert main.main(longer) == 2
    assert "was trained on other images: their names or labels differ" in capsys.readouterr().out
    assert differences(checkpoint.load_file(folder(tmp_path / "out") / "best.pth"), before) == []
