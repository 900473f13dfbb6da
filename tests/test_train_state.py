"""When a run saves, and its last checkpoint: tried again where the disk is full, put elsewhere, never lost silently."""

import errno
import signal
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import distributed
import main
import train_state
from config import load_config
from tests.helpers import DIGITS, TINY, arguments, folder
from train_state import Checkpointer, NotSavedError, Preempted

STATE = SimpleNamespace(step=3, state_dict=lambda: {"model": {"w": torch.zeros(3)}, "step": 3})


@pytest.fixture
def full(monkeypatch, tmp_path):
    """Saving into ``tmp_path/run`` fails so many times; every failure may first call a function."""
    def fill(times, then=lambda: None):
        save, failures = checkpoint.save_checkpoint, []

        def patched(content, place, *args):
            if place == tmp_path / "run" and len(failures) < times:
                failures.append(place)
                then()
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(content, place, *args)

        monkeypatch.setattr(checkpoint, "save_checkpoint", patched)
        return failures

    monkeypatch.setattr(train_state, "SECONDS_WHEN_STOPPED", 0.2)
    monkeypatch.setattr(train_state, "SECONDS_BETWEEN", 0.01)
    return fill


def checkpointer(tmp_path, *options):
    return Checkpointer(load_config(DIGITS, [*TINY, "TAG", "a", "HANG_MINUTES", "0.02", *options]), tmp_path / "run")


def test_it_is_tried_again_until_there_is_room(full, tmp_path):
    failures = full(3)
    assert checkpointer(tmp_path).save(STATE, is_last=True) is True
    assert len(failures) == 3 and checkpoint.load_file(tmp_path / "run" / "ckpt_step_00000003.pth")["step"] == 3


def test_another_one_is_not_tried_again(full, tmp_path):
    failures = full(10**9)
    assert checkpointer(tmp_path).save(STATE) is False
    assert len(failures) == 1


def test_no_room_is_an_error(full, tmp_path):
    failures = full(10**9)
    with pytest.raises(NotSavedError, match=r"the last checkpoint is not in .*/run; the log says why"):
        checkpointer(tmp_path).save(STATE, is_last=True)
    assert len(failures) > 2


def test_elsewhere(full, tmp_path):
    full(10**9)
    with pytest.raises(NotSavedError):
        checkpointer(tmp_path, "SAVE_ELSEWHERE", str(tmp_path / "other")).save(STATE, is_last=True)
    saved = tmp_path / "other" / DIGITS.stem / "a" / "ckpt_step_00000003.pth"
    assert checkpoint.load_file(saved)["step"] == 3


def test_a_stopped_run_that_could_not_be_saved_does_not_claim_to_be(full, tmp_path):
    failures = full(10**9)
    with checkpointer(tmp_path) as saver:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(NotSavedError):
            saver.save(STATE)
    assert len(failures) > 2


def test_a_stopped_run_is_tried_again_too(full, tmp_path):
    full(2)
    with checkpointer(tmp_path) as saver:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted):
            saver.save(STATE)
    assert (tmp_path / "run" / "ckpt_step_00000003.pth").exists()


def test_a_signal_ends_the_waiting(full, tmp_path):
    with checkpointer(tmp_path, "HANG_MINUTES", "100") as saver:
        failures = full(10**9, then=lambda: len(failures) == 3 and signal.raise_signal(signal.SIGTERM))
        with pytest.raises(NotSavedError):
            saver.save(STATE, is_last=True)
    assert len(failures) == 3


def test_the_run_ends_with_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", no_room)
    monkeypatch.setattr(train_state, "SECONDS_BETWEEN", 0.1)
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 1, "HANG_MINUTES", 0.01)) == 74
    out = capsys.readouterr().out
    assert out.rstrip().endswith("the last checkpoint is not in "
                                 f"{folder(tmp_path)}; the log says why") and "Best top-1" not in out


# ---- when a run saves ------------------------------------------------------------------------------

@pytest.fixture
def sent(monkeypatch):
    """The wishes that this process sends, where there are two and the other one wishes nothing."""
    wishes = []

    def begin(wish):
        wishes.append(wish)
        return lambda: wish

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "begin_to_agree_on_largest", begin)
    return wishes


def answers(checkpointer, steps):
    return [checkpointer.is_due(SimpleNamespace(step=step)) for step in steps]


def test_a_signal_is_heeded_one_update_later_and_once(sent, tmp_path):
    checkpointer = Checkpointer(load_config(DIGITS), tmp_path)
    assert answers(checkpointer, [1, 2]) == [False, False]
    checkpointer.signal = "SIGTERM"
    assert answers(checkpointer, [3, 4]) == [False, True]
    checkpointer.signal = None
    assert answers(checkpointer, [5, 6]) == [False, False]
    assert len(sent) == 5 and sent[2] > sent[0] == sent[1]  # nothing is sent where the run saves at once


def test_a_fixed_number_of_updates_needs_no_agreement(sent, tmp_path):
    checkpointer = Checkpointer(load_config(DIGITS, ["SAVE_STEPS", "3"]), tmp_path)
    assert answers(checkpointer, range(1, 8)) == [False, False, True, False, False, True, False]


def test_alone_it_saves_at_once(tmp_path):
    checkpointer = Checkpointer(load_config(DIGITS), tmp_path)
    assert answers(checkpointer, [1]) == [False]
    checkpointer.signal = "SIGTERM"
    assert answers(checkpointer, [2]) == [True]
