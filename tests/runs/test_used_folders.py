"""What a run makes of a folder that another run has used, or is using."""

import os
import shutil

import pytest

import checkpoint
import engine
import evaluation
import main
from data.datasets import read_digits
from models import InputError
from tests.helpers import arguments, folder


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
    assert "make room and rerun the same command" in capsys.readouterr().out
    assert [path.name for path in checkpoint.list_checkpoints(folder(tmp_path))] == ["ckpt_step_00000007.pth"]


def test_a_run_at_0_percent_has_a_best_checkpoint(tmp_path, monkeypatch):
    result = {"acc1": 0.0, "acc5": 0.0, "loss": 9.0, "images": 360}
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: result)
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)) == 0
    assert checkpoint.load_file(folder(tmp_path) / "best.pth")["max_accuracy"] == 0


def test_an_evaluation_keeps_other_runs_out_of_its_folder(trained, monkeypatch):
    """Asked from another process, since the lock belongs to the one that evaluates."""
    locked = []

    def evaluate(*arguments):
        child = os.fork()
        if child == 0:
            try:
                checkpoint.lock_folder(folder(trained))
            except InputError:
                os._exit(3)
            os._exit(0)
        locked.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return engine.evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert main.main([*arguments(trained), "--eval"]) == 0
    assert locked == [3, 3]  # the network and its average


def test_an_evaluation_on_other_classes_is_refused(trained, tmp_path, monkeypatch, capsys):
    content = checkpoint.load_file(folder(trained) / "best.pth") | {"classes": list("0123456798")}
    swapped = str(tmp_path / "swapped.pth")
    checkpoint.save_file(content, swapped)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("evaluated"))
    images, labels, _ = read_digits("val")
    names = "zero one two three four five six seven eight nine".split()
    monkeypatch.setattr("data.datasets.read_digits", lambda split: (images, labels, names))
    assert main.main(arguments(tmp_path, "DATA.DATASET", "digits", flags=["--eval", "--resume", swapped])) == 2
    assert "label 0 is '0' in the checkpoint and 'zero' in the data set" in capsys.readouterr().out
