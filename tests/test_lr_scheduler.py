"""The learning rate by step, against the figures of the released schedules (tests/fidelity/lr_schedule.json)."""

import json
import math
from pathlib import Path

import pytest
import torch

from config import load_config
from lr_scheduler import LRScheduler, learning_rate

FIGURES = json.loads((Path(__file__).parent / "fidelity" / "lr_schedule.json").read_text())
STEPS_PER_EPOCH = 100  # of the figures


def schedule(name, *opts):
    return load_config("", ["TRAIN.LR_SCHEDULER.NAME", name, *opts])


def sgd(*groups):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], **group} for group in groups], lr=1.0)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name):
    config = schedule(name)
    scheduler = LRScheduler(config, sgd({}), STEPS_PER_EPOCH)
    assert len(FIGURES[name]) >= 14
    for step, expected in FIGURES[name].items():
        assert learning_rate(config, int(step), STEPS_PER_EPOCH) == pytest.approx(expected, rel=1e-12, abs=0), step
        scheduler.step_update(int(step))
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=0), step


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_stepping_through_a_training(name):
    """Every update gets the rate of its own step; the last one is not yet at the minimum."""
    config = schedule(name, "TRAIN.EPOCHS", 60, "TRAIN.WARMUP_EPOCHS", 8, "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 10)
    optimizer = sgd({})
    scheduler = LRScheduler(config, optimizer, steps_per_epoch=7)
    for step in range(60 * 7 + 5):
        expected = learning_rate(config, step, 7)
        assert optimizer.param_groups[0]["lr"] == scheduler.lr == expected
        optimizer.step()
        scheduler.step_update(step + 1)
    assert learning_rate(config, 0, 7) == 5e-7
    assert learning_rate(config, 28, 7) == pytest.approx((5e-7 + 5e-4) / 2, rel=1e-12)
    at_warmup_end, quarter = learning_rate(config, 56, 7), learning_rate(config, 105, 7)
    if name == "cosine":  # its half period begins with the training, not with the end of the warm-up
        assert at_warmup_end == pytest.approx(5e-6 + 495e-6 * (1 + math.cos(math.pi * 56 / 420)) / 2, rel=1e-12)
        assert quarter == pytest.approx(5e-6 + 495e-6 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)
    elif name == "linear":
        assert at_warmup_end == 5e-4
        assert quarter == pytest.approx(5e-4 - 495e-6 * (105 - 56) / (420 - 56), rel=1e-12)
    else:
        assert at_warmup_end == learning_rate(config, 56 + 69, 7) == 5e-4
        assert learning_rate(config, 56 + 70, 7) == pytest.approx(5e-5, rel=1e-12)
    if name != "step":  # after the end it stays at the minimum
        assert learning_rate(config, 420, 7) == learning_rate(config, 424, 7) == pytest.approx(5e-6, rel=1e-12)
        assert learning_rate(config, 419, 7) > 5e-6


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_no_warmup_and_warmup_alone(name):
    no_warmup = schedule(name, "TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0)
    assert learning_rate(no_warmup, 0, 3) == 5e-4
    warmup_alone = schedule(name, "TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 2)
    rates = [learning_rate(warmup_alone, step, 3) for step in range(6)]
    assert rates == pytest.approx([5e-7 + (5e-4 - 5e-7) * step / 6 for step in range(6)], rel=1e-12)
    assert math.isfinite(learning_rate(warmup_alone, 6, 3))


def test_groups_are_scaled():
    config = schedule("cosine")
    optimizer = sgd({}, {"lr_scale": 0.25}, {"lr": 0.1, "lr_scale": 0.0}, {"initial_lr": 9.0})
    scheduler = LRScheduler(config, optimizer, STEPS_PER_EPOCH)
    for step in (0, 1, 2000, 29999):
        scheduler.step_update(step)
        lr = learning_rate(config, step, STEPS_PER_EPOCH)
        assert [group["lr"] for group in optimizer.param_groups] == [lr, lr * 0.25, 0.0, lr]


def test_state_round_trip():
    config = schedule("cosine")
    scheduler = LRScheduler(config, sgd({}), STEPS_PER_EPOCH)
    scheduler.step_update(12_345)
    state = scheduler.state_dict()
    other = LRScheduler(config, sgd({}), STEPS_PER_EPOCH)
    assert other.state_dict() != state
    other.step_update(state["step"])
    assert other.state_dict() == state == {"step": 12_345, "lr": learning_rate(config, 12_345, STEPS_PER_EPOCH)}
    assert other.optimizer.param_groups[0]["lr"] == state["lr"]
