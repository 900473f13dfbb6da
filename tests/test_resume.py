"""What a run saves, when, and whether a checkpoint may go on as this run."""

import copy
import errno
import io
import math
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.optim import list_optimizers
from timm.utils import ModelEmaV3

import checkpoint
import distributed
import main
import resume
from config import load_config
from lr_scheduler import LRScheduler
from optimizer import build_optimizer
from resume import (
    Checkpointer,
    Layout,
    NotSavedError,
    Preempted,
    TrainState,
    get_rng_state,
    seed_everything,
    set_rng_state,
)
from resume_checks import check_optimizer
from tests.helpers import DIGITS, TINY, arguments, differences, folder, tiny_network
from utils import InputError

# ---- saving ----------------------------------------------------------------------------------------

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

    monkeypatch.setattr(resume, "SECONDS_WHEN_STOPPED", 0.2)
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.01)
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
    monkeypatch.setattr(resume, "SECONDS_BETWEEN", 0.1)
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
    monkeypatch.setattr(distributed, "begin_any", begin)
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


# ---- random states ---------------------------------------------------------------------------------

def draw():
    return [random.random(), random.gauss(0, 1), *np.random.rand(3), np.random.normal(), *torch.randn(3).tolist()]


def test_rng_state_round_trip():
    seed_everything(5)
    draw()
    random.gauss(0, 1)  # Python and NumPy hold half a pair of normal numbers now
    np.random.normal()
    file = io.BytesIO()
    torch.save(get_rng_state(), file)
    expected = draw()
    assert draw() != expected
    file.seek(0)
    set_rng_state(torch.load(file, weights_only=True))
    assert draw() == expected


def test_seed_everything():
    seed_everything(3)
    expected = draw()
    assert draw() != expected
    seed_everything(4)
    assert all(a != b for a, b in zip(draw(), expected, strict=True))
    seed_everything(3)
    assert draw() == expected
    seed_everything(2**40)  # beyond what NumPy takes


# ---- checks ----------------------------------------------------------------------------------------

def training(optimizer="adamw", fp16=False, **changed):
    """A TrainState of a tiny network in the middle of its second epoch, of 7 micro-batches and 4 updates."""
    config = load_config(DIGITS, [*TINY, "TRAIN.OPTIMIZER.NAME", optimizer, "TRAIN.ACCUMULATION_STEPS", 2])
    model = tiny_network()[1]
    optimizer = build_optimizer(config, model)
    layout = {"dataset": "digits", "training_images": 1437, "num_classes": 10, "seed": 0, "is_sharded": False,
              "batch_size": 200, "world_size": 1, "accumulation_steps": 2, "augment_on": "worker"} | changed
    state = TrainState(Layout(**layout), model, optimizer, LRScheduler(config, optimizer, 4),
                       torch.amp.GradScaler("cpu", enabled=fp16), ModelEmaV3(model), epoch=1, batch=2, step=5)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state.lr_scheduler.step_update(state.step)
    return state


@pytest.fixture(scope="module")
def state():
    """A training that no test changes."""
    return training()


@pytest.fixture(scope="module")
def saved(state):
    return copy.deepcopy(state.state_dict())


def spoilt(content, path, value):
    """A copy of the content with the entry at ``path`` replaced, or made from the old one by a function."""
    content = copy.deepcopy(content)
    *parents, last = path
    place = content
    for key in parents:
        place = list(place.values())[key] if isinstance(place, dict) and key not in place else place[key]
    place[last] = value(place[last]) if callable(value) else value
    return content


EXP_AVG = ("optimizer", "state", 0, "exp_avg")
CASES = [
    (("layout",), 3, "layout"),
    (("layout",), lambda layout: layout | {"more": 1}, "another version of this code"),
    (("layout", "batch_size"), "200", "layout's batch_size is '200'"),
    (("layout", "batch_size"), 0, "layout's batch_size is 0"),
    (("layout", "batch_size"), 2000, "fewer training_images than a batch"),
    (("layout", "world_size"), True, "layout's world_size is True"),
    (("layout", "seed"), 2**63, "layout's seed"),
    (("layout", "training_images"), 1438, r"another data set \(training_images 1438 -> 1437\)"),
    (("epoch",), "0", "its epoch is '0'"),
    (("epoch",), 10**9, "its epoch is 1000000000"),
    (("epoch",), None, "its epoch is None"),
    (("epoch",), 2, "its step is 5, but epoch 2 and batch 2 come after 9 updates"),
    (("batch",), 8, "its batch is 8; it must be a number from 0 to 7"),
    (("batch",), 3, "its batch is 3, in the middle of an update"),
    (("batch",), -1, "its batch is -1"),
    (("step",), -7, "its step is -7"),
    (("step",), torch.tensor(5), "its step is tensor"),
    (("max_accuracy",), float("nan"), "its max_accuracy is nan"),
    (("max_accuracy",), 101, "its max_accuracy is 101"),
    (("max_accuracy",), [1], "its max_accuracy is"),
    (("skipped_in_row",), -1, "its skipped_in_row is -1"),
    (("scaler",), 3, "its scaler is int, but must be dict"),
    (("model",), None, "the weights are NoneType, not a state dict"),
    (("model", "head.bias"), torch.zeros(3), "shape: head.bias"),
    (("model", "head.bias"), torch.full((10,), torch.inf), "not finite: head.bias"),
    (("model_ema",), None, "holds no average"),
    (("model_ema",), 3, "the weights are int, not a state dict"),
    (("model_ema", "head.bias"), torch.full((10,), torch.nan), "not finite: head.bias"),
    (("optimizer",), 3, "another one or has other parameter groups"),
    (("optimizer", "param_groups"), [], "parameter groups"),
    (("optimizer", "param_groups"), {"params": []}, "another one or has other parameter groups"),
    (("optimizer", "param_groups", 0, "params"), 3, "another one or has other parameter groups"),
    (("optimizer", "param_groups", 0, "params"), lambda ids: ids[:-1], "other parameter groups"),
    (("optimizer", "param_groups", 0, "params"), lambda ids: [*ids[1:], ids[0]], "other parameter groups"),
    (("optimizer", "param_groups", 0, "params"), lambda ids: [str(i) for i in ids], "other parameter groups"),
    (("optimizer", "param_groups", 0, "params"), lambda ids: [torch.zeros(2), *ids[1:]], "other parameter groups"),
    (("optimizer", "param_groups", 0), lambda group: group | {"nesterov": True}, "another one or has"),
    (("optimizer", "state"), [], "not a mapping"),
    (("optimizer", "state"), lambda state: state | {10**6: state[0]}, "not a mapping from the numbers"),
    (("optimizer", "state", 0), 3, "parameter 0 is int, but must be dict"),
    (("optimizer", "state", 0), {}, "parameter 0 does not hold"),
    (("optimizer", "state", 0), lambda entry: entry | {3: 4}, "parameter 0 does not hold"),
    (("optimizer", "state", 0, "step"), 3, "parameter 0: step is int"),
    (("optimizer", "state", 0, "step"), torch.zeros(2), r"step is \(2,\) of torch.float32, but must be \(\)"),
    (("optimizer", "state", 0, "step"), torch.tensor(-1.0), "step is not finite, below 0 or too"),
    (EXP_AVG, torch.zeros(1), r"exp_avg is \(1,\) of torch.float32, but must be"),  # once a heap corruption
    (EXP_AVG, lambda value: value[..., :-1], "exp_avg is"),
    (EXP_AVG, lambda value: value.double(), "exp_avg is .* of torch.float64"),
    (EXP_AVG, lambda value: value * torch.nan, "exp_avg is not finite"),
    (("optimizer", "state", 0, "exp_avg_sq"), lambda value: value - 1, "exp_avg_sq is not finite, below 0 or too"),
    (("rng",), [], "not a list of 1 random states"),
    (("rng",), {}, "not a list of 1 random states"),
    (("rng", 0), None, "invalid random state"),
    (("rng", 0, "python"), (3, (1, 2), None), "invalid random state"),
    (("rng", 0, "python"), lambda state: (*state[:2], "1.5"), "invalid random state"),
    (("rng", 0, "python"), lambda state: (3, (*state[1][:-1], 625), None), "invalid random state"),
    (("rng", 0, "numpy"), lambda state: (*state[:2], 10**6, *state[3:]), "out of range"),  # once a read beyond the end
    (("rng", 0, "numpy"), lambda state: (*state[:2], "1", *state[3:]), "invalid random state"),
    (("rng", 0, "numpy"), lambda state: (state[0], state[1][:3], *state[2:]), "invalid random state"),
    (("rng", 0, "numpy"), lambda state: ("PCG64", *state[1:]), "invalid random state"),
    (("rng", 0, "torch"), torch.zeros(5056, dtype=torch.uint8), "invalid random state"),
    (("rng", 0, "torch"), lambda state: state.float(), "invalid random state"),
    (("rng", 0, "torch"), lambda state: state[:10], "invalid random state"),
]


@pytest.mark.parametrize(("path", "value", "message"), CASES)
def test_odd_entries_are_refused_and_nothing_changes(path, value, message, state, saved):
    rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(spoilt(saved, path, value))
    assert torch.equal(torch.get_rng_state(), rng)
    assert differences(state.state_dict() | {"rng": saved["rng"]}, saved) == []


def stepped(name, steps=1):
    """An optimiser of a matrix and a bias after some steps."""
    model = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(load_config(DIGITS, ["TRAIN.OPTIMIZER.NAME", name]), model)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("name", "path", "value", "message"), [
    ("lamb", ("state", 0, "exp_avg"), torch.zeros(1), r"parameter 0: exp_avg is \(1,\) of torch.float32, but must be"),
    ("lamb", ("state", 0), {}, "parameter 0 does not hold exp_avg, exp_avg_sq"),
    ("lamb", ("param_groups", 0, "step"), "1", "group 0: step is str"),
    ("lamb", ("param_groups", 0, "step"), torch.tensor(-1.0), "group 0: step is not finite, below 0 or too"),
    ("adan", ("param_groups", 1, "step"), 1.5, "group 1: step is float, but must be int"),
    ("adan", ("state", 1, "neg_pre_grad"), None, "parameter 1: neg_pre_grad is NoneType"),
    ("adafactor", ("state", 0, "RMS"), "x", "parameter 0: RMS is str"),
    ("nadamlegacy", ("state", 0, "m_schedule"), float("nan"), "m_schedule is not finite"),
    ("adagrad", ("state",), {}, "state lacks parameter 0"),
])
def test_an_optimiser_of_timm_is_checked_like_pytorch_s(name, path, value, message):
    """What each holds is listed nowhere: it is compared with what a step leaves."""
    saved = copy.deepcopy(stepped(name).state_dict())
    check_optimizer(saved, stepped(name, steps=0))
    with pytest.raises(InputError, match=message):
        check_optimizer(spoilt(saved, path, value), stepped(name, steps=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimiser_s_own_state_is_accepted(name):
    """Also after several steps, at some of which a few do more than at others."""
    try:
        fresh = stepped(name, steps=0)
    except InputError as error:
        pytest.skip(str(error))
    for steps in (1, 5, 12):
        check_optimizer(stepped(name, steps).state_dict(), fresh)


def test_a_checkpoint_of_any_layout_is_not_of_a_finished_run():
    config = load_config(DIGITS)
    for images in (1437, torch.zeros(2), None, [1437]):
        content = {"epoch": config.TRAIN.EPOCHS, "layout": {"training_images": images}}
        assert resume.is_finished(content, config, 1437) == (type(images) is int)
    assert not resume.is_finished({"epoch": 3}, config, 1437) and not resume.is_finished(None, config, 1437)


def test_missing_entries_are_named(state, saved):
    for key in saved.keys() - {"best_loss"}:
        with pytest.raises(InputError, match=f"it lacks {key};"):
            state.load_state_dict({other: value for other, value in saved.items() if other != key})


def test_odd_scalers_are_refused():
    state = training(fp16=True)
    content = state.state_dict()
    for key, value in [("scale", float("inf")), ("scale", "1"), ("growth_interval", 1.5),
                       ("_growth_tracker", 2**40), ("backoff_factor", None)]:
        with pytest.raises(InputError, match=f"its scaler: {key} is"):
            state.load_state_dict(content | {"scaler": content["scaler"] | {key: value}})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_training_is_restored_to_the_bit(optimizer):
    content = copy.deepcopy(training(optimizer, fp16=True).state_dict())
    state = training(optimizer, fp16=True)
    for parameter in state.model.parameters():
        parameter.data.zero_()
    state.epoch = state.batch = state.step = 0
    state.load_state_dict(content)
    assert differences(state.state_dict(), content) == []


def test_moments_take_the_layout_of_their_parameters(saved):
    """A fused optimiser walks over both as they lie in memory; in another layout it would mix up their elements."""
    state = training()
    state.model.to(memory_format=torch.channels_last)
    content = copy.deepcopy(saved)
    for entry in content["optimizer"]["state"].values():
        entry["exp_avg"] = entry["exp_avg"].contiguous()
    state.load_state_dict(content)
    is_reordered = False
    for parameter, entry in state.optimizer.state.items():
        assert entry["exp_avg"].stride() == parameter.stride()
        is_reordered |= not parameter.is_contiguous()
    assert is_reordered
    assert differences(state.state_dict()["optimizer"], content["optimizer"]) == []


def test_a_state_before_the_first_update_is_accepted(saved):
    content = copy.deepcopy(saved)
    content["optimizer"]["state"] = {}
    content |= {"epoch": 0, "batch": 0, "step": 0, "max_accuracy": -1.0}
    state = training()
    state.optimizer.state.clear()
    state.load_state_dict(content)
    assert state.step == 0 and state.optimizer.state_dict()["state"] == {}


def test_the_end_of_an_epoch_is_a_place_between_updates(saved):
    """The last update of an epoch may have fewer micro-batches."""
    state = training()
    state.load_state_dict(saved | {"batch": 7, "step": 8})
    assert (state.batch, state.step) == (7, 8)


# ---- the best epoch --------------------------------------------------------------------------------

def result(acc1, loss):
    return {"acc1": acc1, "loss": loss}


def test_the_best_is_the_better_of_network_and_average_and_ties_go_by_loss():
    state = training()
    state.epoch, state.max_accuracy, state.best_loss = 0, -1.0, math.inf
    for results, is_best, is_average, best in [
        ({"eval": result(50.0, 2.0), "eval_ema": result(10.0, 3.0)}, True, False, (50.0, 2.0)),
        ({"eval": result(50.0, 1.0), "eval_ema": result(20.0, 1.0)}, True, False, (50.0, 1.0)),
        ({"eval": result(50.0, 1.0), "eval_ema": result(50.0, 0.5)}, True, True, (50.0, 0.5)),
        ({"eval": result(50.0, 0.7), "eval_ema": result(40.0, 0.1)}, False, False, (50.0, 0.5)),
        ({"eval": result(90.0, math.nan)}, False, False, (50.0, 0.5)),
    ]:
        assert state.finish_epoch(results) == (is_best, is_average)
        assert (state.max_accuracy, state.best_loss) == best
    assert (state.epoch, state.batch) == (5, 0)


def test_a_checkpoint_without_the_best_loss_resumes(saved):
    """As those of version 1.0."""
    state = training()
    state.load_state_dict({key: value for key, value in saved.items() if key != "best_loss"})
    assert state.best_loss == math.inf


def test_another_effective_batch_is_said_and_recorded(saved, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(resume.logger, "propagate", True)
    saver = checkpointer(tmp_path)
    (tmp_path / "run").mkdir()
    state = training(batch_size=100, accumulation_steps=2)
    resume.resume(tmp_path / "a.pth", copy.deepcopy(saved), state, saver)
    assert saver.metadata["changes"] == [{"step": 5, "keys": {"effective batch": "400 -> 200"}}]
    assert "the effective batch (images per update) changes from 400 to 200" in caplog.text


def test_signals_that_are_ignored_stay_ignored(tmp_path):
    """Of a run under nohup, which outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with checkpointer(tmp_path) as saver:
            signal.raise_signal(signal.SIGHUP)
            assert saver.signal is None
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with checkpointer(tmp_path) as saver:
            signal.raise_signal(signal.SIGHUP)
            assert saver.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
