"""A checkpoint alone gives the network: config, weights and class names."""

import pytest
import torch
from torch.testing import assert_close
from yacs.config import CfgNode

import checkpoint
from config import from_dict, load_config, to_dict
from inference import load_network
from models import adapt_size, build_model
from tests.helpers import DIGITS, TINY, differences, save_network, tiny_network
from tests.nets import as_stored
from tests.processes import ROOT


def logits(model):
    with torch.inference_mode():
        return model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


def architecture_of(config):
    """What is left of a config that comes out of a checkpoint: the network and how images are prepared."""
    kept = {key: value for key, value in to_dict(config).items() if key in ("MODEL", "TEST")}
    kept["DATA"] = {key: config.DATA[key] for key in ("DATASET", "IMG_SIZE", "INTERPOLATION")}
    return from_dict(kept, "a test")


def test_own_checkpoint(tmp_path):
    config, model = tiny_network()
    save_network(tmp_path / "a.pth", config, model)
    loaded, loaded_config, classes = load_network(tmp_path / "a.pth")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert loaded_config == architecture_of(config) and loaded_config.is_frozen()
    assert classes[:2] == ["digit 0", "digit 1"]


def test_the_average_is_taken_where_there_is_one(tmp_path):
    config, model = tiny_network()
    average = tiny_network(seed=1)[1]
    save_network(tmp_path / "a.pth", config, model, model_ema=average.state_dict())
    assert torch.equal(logits(load_network(tmp_path / "a.pth")[0]), logits(average))


def test_older_checkpoints_name_classes_by_number_and_take_defaults_of_newer_keys(tmp_path):
    config, model = tiny_network()
    old = checkpoint.load_file(save_network(tmp_path / "a.pth", config, model))
    del old["classes"], old["config"]["SAVE_MINUTES"]
    checkpoint.save_file(old, tmp_path / "a.pth")
    loaded, loaded_config, classes = load_network(tmp_path / "a.pth")
    assert loaded_config == architecture_of(config) and classes == [str(label) for label in range(10)]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("layout", ["proj_w", "proh_w"])
def test_released_checkpoint_needs_a_config(tmp_path, layout):
    config, model = tiny_network()
    released = {"model": as_stored(model.state_dict(), layout), "config": CfgNode({"MODEL": {"SWIN": 1}})}
    torch.save(released, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: its config: MODEL\.SWIN is a setting of Swin.*use --cfg"):
        load_network(tmp_path / "a.pth")
    torch.save({"model": released["model"]}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: it holds no config; use --cfg"):
        load_network(tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        assert_close(logits(load_network(tmp_path / name, config)[0]), logits(model), rtol=0, atol=0)


def test_a_config_of_another_size_adapts_the_weights(tmp_path):
    config, model = tiny_network()
    save_network(tmp_path / "a.pth", config, model)
    larger = load_config(DIGITS, [*TINY, "DATA.IMG_SIZE", "32"])
    loaded, loaded_config, _ = load_network(tmp_path / "a.pth", larger)
    expected = adapt_size(model.state_dict(), build_model(larger))
    assert differences(dict(loaded.state_dict()), expected) == [] and loaded_config.DATA.IMG_SIZE == 32


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": {}}, r"a\.pth: no weights under 'model'"),
        ({"model": {"head.bias": torch.zeros(10)}}, r"a\.pth: the weights do not fit the model"),
        ({"classes": ["cat", "dog"]}, r"a\.pth: it has 2 classes but MODEL\.NUM_CLASSES is 10"),
        ({"config": {"MODEL": {"NUM_CLASSES": 0}}}, r"a\.pth: MODEL\.NUM_CLASSES is 0; .*; use --cfg"),
    ],
)
def test_faults(entries, message, tmp_path):
    config, model = tiny_network()
    save_network(tmp_path / "a.pth", config, model, **entries)
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "a.pth")


def test_a_network_of_another_kind_fills_no_screen(tmp_path):
    save_network(tmp_path / "a.pth", *tiny_network())
    other = load_config(ROOT / "configs/small/smlp_nano_alpha3_patch2_32_cifar10.yaml")
    with pytest.raises(ValueError, match="the weights do not fit") as caught:
        load_network(tmp_path / "a.pth", other)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[1].startswith("  missing: stages.2.1.") and lines[10].endswith(" more")


def test_damaged_safetensors_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"hello, this is no header")
    with pytest.raises(checkpoint.CheckpointError, match=r"a\.safetensors is damaged or not a safetensors file"):
        load_network(tmp_path / "a.safetensors")
