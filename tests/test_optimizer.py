"""Parameter groups and the options of the optimisers."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch

from config import load_config
from engine import _Updater
from optimizer import build_optimizer
from tests.helpers import differences
from tests.nets import tiny_net
from utils import InputError


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups(name):
    model = tiny_net(depths=(1, 1, 1, 1))
    optimizer = build_optimizer(load_config("", ["TRAIN.OPTIMIZER.NAME", name]), model)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}
    assert groups.keys() == {0.05, 0.0}
    assert sorted(groups[0.05] + groups[0.0]) == sorted(names.values())  # nothing lost, nothing twice

    def ending(*ends):
        return {key for key in names.values() if key.endswith(ends)}

    parameters = dict(model.named_parameters())
    tables, grn = ending("position.table"), ending("grn.gamma", "grn.beta")
    strip_biases = ending("strip.bias")
    assert len(tables) == len(grn) == len(strip_biases) == 2 * 4
    assert tables | grn | ending("strip.weight") <= set(groups[0.05])
    assert {parameters[key].ndim for key in strip_biases} == {2}
    assert ending("bias") == {key for key in groups[0.0] if key.endswith("bias")}
    one_dimensional = {key for key, p in parameters.items() if p.ndim == 1}
    assert set(groups[0.0]) == one_dimensional | strip_biases


def test_frozen_parameters_are_left_out():
    model = tiny_net(depths=(1, 1, 1, 1))
    model.stem.requires_grad_(False)
    optimizer = build_optimizer(load_config(), model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for key, p in model.named_parameters() if key != "stem.weight"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_layer_decay(name):
    """Half the learning rate a layer: head, block of stage 4 (with what leads into it and the norm), ..., the stem."""
    model = tiny_net(depths=(1, 1, 1, 1))
    model.stages[0].requires_grad_(False)
    optimizer = build_optimizer(load_config("", ["TRAIN.OPTIMIZER.NAME", name, "TRAIN.LAYER_DECAY", 0.5]), model)
    layers = [("stem.",), ("stages.0",), ("stages.1", "merging.0"), ("stages.2", "merging.1", "shortcut_m1"),
              ("stages.3", "merging.2", "shortcut_s", "shortcut_m2", "norm."), ("head",)]
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    for key, p in model.named_parameters():
        if key.startswith("stages.0"):
            assert id(p) not in found
            continue
        assert found[id(p)]["lr_scale"] == 0.5 ** next(5 - i for i, names in enumerate(layers) if key.startswith(names))
        assert found[id(p)]["weight_decay"] == (0.0 if p.ndim == 1 or key.endswith("bias") else 0.05)


def test_layer_decay_of_other_models():
    """timm's models by their own layers; not a model that has no ``group_matcher``."""
    config = load_config("", ["TRAIN.LAYER_DECAY", 0.8])
    model = timm.create_model("resnet10t", num_classes=3)
    groups = build_optimizer(config, model).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.fc.weight)] == 1
    assert scales[id(model.layer4[0].conv1.weight)] == pytest.approx(0.8)
    assert scales[id(model.conv1[0].weight)] == pytest.approx(0.8**5)
    with pytest.raises(ValueError, match="Linear does not define its layers .*; set TRAIN.LAYER_DECAY 1"):
        build_optimizer(config, torch.nn.Linear(2, 2))
    build_optimizer(load_config(), torch.nn.Linear(2, 2))


def test_options():
    opts = ["TRAIN.BASE_LR", "1e-3", "TRAIN.WEIGHT_DECAY", "0.3", "TRAIN.OPTIMIZER.EPS", "1e-6",
            "TRAIN.OPTIMIZER.BETAS", "[0.8, 0.95]", "TRAIN.OPTIMIZER.MOMENTUM", "0.7"]
    adamw = build_optimizer(load_config("", opts), tiny_net(depths=(1, 1, 1, 1)))
    sgd = build_optimizer(load_config("", [*opts, "TRAIN.OPTIMIZER.NAME", "sgd"]), tiny_net(depths=(1, 1, 1, 1)))
    assert (type(adamw), type(sgd)) == (torch.optim.AdamW, torch.optim.SGD)
    for optimizer in (adamw, sgd):
        assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.3), (1e-3, 0.0)]
    for group in adamw.param_groups:
        assert (group["eps"], group["betas"]) == (1e-6, (0.8, 0.95))
    for group in sgd.param_groups:
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.7, True, 0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_two_steps_against_the_formulas(name):
    """The update rules as their papers have them, in float64, on gradients drawn with seed 1."""
    config = load_config("", ["TRAIN.OPTIMIZER.NAME", name])
    lr, decay, eps, (beta1, beta2) = 5e-4, 0.05, 1e-8, (0.9, 0.999)
    model = tiny_net(depths=(1, 1, 1, 1)).double()
    optimizer = build_optimizer(config, model)
    expected = {key: p.detach().clone() for key, p in model.named_parameters()}
    first = {key: torch.zeros_like(p) for key, p in expected.items()}
    second = {key: torch.zeros_like(p) for key, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for step in (1, 2):
        for key, p in model.named_parameters():
            grad = p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            weight_decay = 0.0 if p.ndim == 1 or key.endswith("bias") else decay
            if name == "adamw":
                first[key] = beta1 * first[key] + (1 - beta1) * grad
                second[key] = beta2 * second[key] + (1 - beta2) * grad**2
                expected[key] *= 1 - lr * weight_decay
                mean, variance = first[key] / (1 - beta1**step), second[key] / (1 - beta2**step)
                expected[key] -= lr * mean / (variance.sqrt() + eps)
            else:
                decayed = grad + weight_decay * expected[key]
                first[key] = 0.9 * first[key] + decayed
                expected[key] -= lr * (decayed + 0.9 * first[key])
        optimizer.step()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[key], rtol=1e-10, atol=1e-14, msg=key)


@pytest.mark.parametrize("name, steps", [
    ("adamw", 0), ("sgd", 0), ("lion", 0), ("lion", 2), ("lamb", 2), ("nadamw", 2)])
def test_a_skipped_update_leaves_weights_and_state_as_they_were(name, steps):
    torch.manual_seed(0)
    config, model = load_config("", ["TRAIN.OPTIMIZER.NAME", name]), torch.nn.Linear(4, 4)
    state = SimpleNamespace(model=model, optimizer=build_optimizer(config, model), ema=None,
                            scaler=torch.amp.GradScaler("cpu", enabled=False))
    updater = _Updater(config, state)

    def update(factor):
        updater.backward(model(torch.ones(2, 4)).square().sum() * factor)
        return bool(updater.update()[1])

    assert [update(1.0) for _ in range(steps)] == [False] * steps
    before = copy.deepcopy((model.state_dict(), state.optimizer.state_dict()["state"]))
    assert update(float("nan"))
    after = model.state_dict(), state.optimizer.state_dict()["state"]
    if steps:
        assert differences(before, after) == []
    assert differences(before[0], after[0]) == []
    assert not update(1.0) and differences(before[0], model.state_dict())


def test_an_optimiser_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match="TRAIN.OPTIMIZER.NAME is 'lino'; .*did you mean lion"):
        load_config("", ["TRAIN.OPTIMIZER.NAME", "lino"])
    with pytest.raises(InputError, match="adahessian needs second derivatives"):
        build_optimizer(load_config("", ["TRAIN.OPTIMIZER.NAME", "adahessian"]), torch.nn.Linear(2, 2))
