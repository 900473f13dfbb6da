"""When a run saves: several processes agree on it while they compute the next update."""

from types import SimpleNamespace

import pytest

import distributed
from config import load_config
from tests.helpers import DIGITS
from train_state import Checkpointer


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
