"""A folder's run is gone on with under the settings that it began with, or not at all."""

import shutil

import pytest
import yaml

import checkpoint
import main
from config import load_config, to_dict
from resume import changed_keys
from tests.helpers import DIGITS, TINY, arguments, folder

SHORT = ("TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EMA.ENABLED", False, "DATA.BATCH_SIZE", 140)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    assert main.main(arguments(output, *SHORT)) == 0
    return output


def contents(output) -> dict:
    """What a run's folder holds, but for the lock."""
    files = [path for path in folder(output).rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.name: path.read_bytes() for path in files}


def test_other_settings_are_refused_before_anything_is_written(finished, capsys):
    before = contents(finished)
    assert main.main(arguments(finished, *SHORT, "TRAIN.BASE_LR", 0.01, "AUG.MIXUP", 0)) == 2
    out = capsys.readouterr().out
    assert "other settings: TRAIN.BASE_LR 0.002 -> 0.01, AUG.MIXUP 0.8 -> 0.0." in out
    assert "--tag" in out and "--allow-changes" in out
    assert main.main(arguments(finished, *SHORT, "TRAIN.EPOCHS", 2)) == 2
    assert "TRAIN.EPOCHS 1 -> 2" in capsys.readouterr().out
    assert contents(finished) == before


def test_a_finished_run_says_so_and_stays_as_it_is(finished, capsys):
    before = contents(finished)
    assert main.main(arguments(finished, *SHORT, "PRINT_FREQ", 1, "DATA.BATCH_SIZE", 70)) == 0
    out = capsys.readouterr().out
    assert "this run is finished, nothing was trained: best top-1" in out and "best.pth" in out
    assert contents(finished) == before


@pytest.mark.parametrize("flags", [[], ["--allow-changes"]], ids=["", "allowed"])
def test_another_network_is_named_by_its_key_not_by_its_shapes(finished, capsys, flags):
    before = contents(finished)
    assert main.main(arguments(finished, *SHORT, "MODEL.STRIP_MLP.EMBED_DIM", 16, flags=flags)) == 2
    out = capsys.readouterr().out
    assert "another network or data set: MODEL.STRIP_MLP.EMBED_DIM 8 -> 16." in out and len(out.splitlines()) == 1
    assert contents(finished) == before


def test_changes_that_are_allowed_are_recorded(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    longer = arguments(tmp_path, *SHORT, "TRAIN.EPOCHS", 2, flags=["--allow-changes"])
    assert main.main(longer) == 0
    expected = [{"step": 2, "keys": {"TRAIN.EPOCHS": "1 -> 2"}}]
    assert yaml.safe_load((folder(tmp_path) / "run.yaml").read_text())["changes"] == expected
    newest = checkpoint.newest_checkpoint(folder(tmp_path))[1]
    assert newest["step"] == 4 and newest["changes"] == expected
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "epoch 1, 2 updates done" in log
    assert log.index("macs:") < log.rindex("resumed"), "what a run says of itself hides where it went on"
    assert main.main(longer) == 0  # finished, now under these settings
    assert yaml.safe_load((folder(tmp_path) / "run.yaml").read_text())["changes"] == expected


def test_a_named_checkpoint_of_other_settings_is_one_of_another_run(finished, tmp_path, capsys):
    best = folder(finished) / "best.pth"
    assert main.main(arguments(tmp_path, *SHORT, "TRAIN.EPOCHS", 2, flags=["--resume", str(best)])) == 2
    assert f"{best} is from a run with other settings: TRAIN.EPOCHS 1 -> 2" in capsys.readouterr().out
    assert not (folder(tmp_path) / "log_rank0.txt").exists()


def test_keys_that_change_nothing_that_is_learnt():
    config = load_config(DIGITS, TINY)
    saved = to_dict(config)
    del saved["DATA"]["HOLD_OUT"]  # as an older version saved it
    free = ("OUTPUT", "elsewhere", "DATA.BATCH_SIZE", "20", "COMPILE", "True", "DATA.NUM_WORKERS", "3")
    assert changed_keys(saved, load_config(DIGITS, [*TINY, *free])) == {}
    assert changed_keys(saved, load_config(DIGITS, [*TINY, "SEED", "4"])) == {"SEED": "0 -> 4"}
