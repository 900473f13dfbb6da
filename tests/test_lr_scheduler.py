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
    assert scheduler.optimizer.param_groups[0]["lr"] == scheduler.lr == pytest.approx(FIGURES[name]["0"], rel=1e-12)
    for step, expected in FIGURES[name].items():
        assert learning_rate(config, int(step), STEPS_PER_EPOCH) == pytest.approx(expected, rel=1e-12, abs=0), step
        scheduler.step_update(int(step))
        assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12, abs=0), step


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
