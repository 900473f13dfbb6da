"""The released network's figures (tests/fidelity/), reproduced through the loader of released checkpoints."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from config import load_config
from models import (
    StripMLPNet,
    convert_released_state_dict,
    load_pretrained,
    load_strict,
    to_released_state_dict,
)
from optimizer import build_optimizer
from tests.nets import relative_error

FIGURES = Path(__file__).parents[1] / "fidelity"
FLOAT64, FLOAT32 = 1e-9, 1e-4  # tolerances, as relative errors in norm


def load_figures(name):
    return json.loads((FIGURES / f"{name}.json").read_text())


def released_weights(figures):
    """The weights of the released network, made by the rule that the figures were computed with."""
    rng = np.random.RandomState(figures["weight_seed"])
    weights = {}
    for key, shape in figures["state_dict"]:
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        a = rng.standard_normal(shape)
        if key.endswith("running_mean"):
            a = 0.1 * a
        elif key.endswith("running_var"):
            a = 0.5 + 0.5 * abs(a)
        elif key.endswith("embeddings_table"):
            a = 0.5 * a
        elif key.endswith(("gamma", "beta", "bias")):
            a = 0.1 * a
        elif a.ndim == 1:
            a = 1 + 0.1 * a
        else:
            a = a / math.sqrt(math.prod(shape[1:]))
        weights[key] = torch.from_numpy(a)
    return weights


def build(figures, dtype, **kwargs):
    model = StripMLPNet(
        img_size=figures["img_size"], num_classes=figures["num_classes"], embed_dim=figures["embed_dim"],
        depths=figures["layers"], mlp_ratio=figures["alpha"], num_patches=2 if figures["embed_dim"] % 80 == 0 else 4,
        **kwargs,
    ).to(dtype)
    load_strict(model, convert_released_state_dict(released_weights(figures)))
    return model


def images_of(figures, dtype):
    shape = (figures["images"], 3, figures["img_size"], figures["img_size"])
    return torch.from_numpy(np.random.RandomState(figures["image_seed"]).standard_normal(shape)).to(dtype)


@pytest.mark.parametrize("name", ["eval_tiny_light_224", pytest.param("eval_small_224", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_logits_and_stage_statistics(name, dtype, tolerance):
    figures = load_figures(name)
    model = build(figures, dtype).eval()
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    outputs = {}
    for stage, blocks in enumerate(model.stages, start=1):
        blocks[-1].register_forward_hook(lambda module, args, out, stage=stage: outputs.update({stage: out.double()}))
    with torch.no_grad():
        logits = model(images_of(figures, dtype))
    assert relative_error(logits, figures["logits"]) < tolerance
    for stage in range(1, 5):
        out = outputs[stage].flatten(1)
        assert relative_error(out.mean(1), figures["stage_mean"][str(stage)]) < tolerance
        assert relative_error(out.square().mean(1).sqrt(), figures["stage_rms"][str(stage)]) < tolerance


@pytest.mark.parametrize("name, model", [("smlpnet_tiny_224", "smlpnet_tiny"), ("wavemlp_s_224", "wave_mlp_small")])
def test_logits_of_the_baselines(name, model):
    """Their published keys are their own, so that a checkpoint loads as it is."""
    figures = load_figures(name)
    net = timm.create_model(model).double().eval()
    assert sum(p.numel() for p in net.parameters()) == figures["parameters"]
    weights = released_weights(figures)
    assert load_pretrained(net, {"model": weights}) == []
    with torch.no_grad():
        assert relative_error(net(images_of(figures, torch.float64)), figures["logits"]) < FLOAT64
    assert net.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_training_steps(layout):
    """Losses, gradient norms and BatchNorm statistics of four AdamW steps, with this project's own optimiser."""
    figures = load_figures("train_c80_64")
    model = build(figures, torch.float64, drop_path_rate=0.0).to(memory_format=layout)
    optimizer = build_optimizer(load_config("", ["MODEL.NAME", "fidelity"]), model)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    images = images_of(figures, torch.float64).contiguous(memory_format=layout)
    targets = torch.arange(figures["images"]) % figures["num_classes"]
    losses, norms = [], []
    for step in range(figures["steps"]):
        loss = criterion(model(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == 0:
            grads = to_released_state_dict({name: p.grad for name, p in model.named_parameters()})
            expected = figures["first_step_grad_norm"]
            assert grads.keys() == expected.keys()
            assert relative_error([float(grads[k].norm()) for k in expected], list(expected.values())) < FLOAT64
            for key, norm in expected.items():  # a bias before a BatchNorm has a zero gradient but for rounding
                assert abs(float(grads[key].norm()) - norm) < FLOAT64 * norm + 1e-13, key
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)))
        optimizer.step()
        losses.append(loss.item())
    assert relative_error(losses, figures["losses"]) < FLOAT64
    assert relative_error(norms, figures["grad_norms_before_clip"]) < FLOAT64
    buffers = to_released_state_dict(dict(model.named_buffers()))
    assert figures["bn_after"].keys() == {key for key in buffers if "running" in key}
    for key, (mean, rms) in figures["bn_after"].items():
        assert float(buffers[key].mean()) == pytest.approx(mean, rel=1e-8, abs=1e-10), key
        assert float(buffers[key].square().mean().sqrt()) == pytest.approx(rms, rel=FLOAT64), key


@pytest.mark.parametrize("name", ["eval_tiny_light_224", "eval_small_224", "train_c80_64"])
def test_key_map_both_directions(name):
    released = released_weights(load_figures(name))
    converted = convert_released_state_dict(released)
    assert len(converted) == len(released)
    back = to_released_state_dict(converted)
    assert list(back) == list(released)
    assert all(torch.equal(back[key], released[key]) for key in released)
    assert not any(key in released for key in converted if not key.startswith(("norm.", "head.")))
