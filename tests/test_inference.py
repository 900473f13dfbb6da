"""From a checkpoint to a network, trusted or not."""

import contextlib
import logging
import re
import socket

import pytest
import safetensors.torch
import torch
import yaml
from torch.testing import assert_close
from yacs.config import CfgNode

import checkpoint
from checkpoint import plain
from config import from_dict, load_config, to_dict
from inference import architecture, check_size, class_names, load_network
from models import adapt_size, build_model
from tests.helpers import DIGITS, TINY, differences, save_network, tiny_network
from tests.nets import as_stored
from tests.processes import ROOT
from tests.watch import Watch
from utils import InputError


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
    save_network(tmp_path / "a.pth", config, model, model_ema=average.state_dict(), is_average_best=False)
    assert torch.equal(logits(load_network(tmp_path / "a.pth")[0]), logits(model))


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
    with pytest.raises(ValueError, match=r"a\.pth: its config does not describe a network: .*use --cfg"):
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
        ({"model": {}}, r"a\.pth: no weights under model"),
        ({"model": {"head.bias": torch.zeros(10)}}, r"a\.pth: the weights do not fit the model"),
        ({"classes": ["cat", "dog"]}, r"a\.pth: it has 2 classes but MODEL\.NUM_CLASSES is 10"),
        ({"config": {"MODEL": {"NUM_CLASSES": 0, "STRIP_MLP": {}}}}, r"a\.pth: MODEL\.NUM_CLASSES is 0; .*; use --cfg"),
    ],
)
def test_faults(entries, message, tmp_path):
    config, model = tiny_network()
    save_network(tmp_path / "a.pth", config, model, **entries)
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "a.pth")


def test_the_checkpoint_says_which_network_it_holds(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("strip_mlp"), "propagate", True)
    config, model = tiny_network()
    save_network(tmp_path / "a.pth", config, model)
    other = load_config(ROOT / "configs/small/smlp_nano_alpha3_patch4_64_imagefolder.yaml", ["DATA.IMG_SIZE", "16",
                        "MODEL.NUM_CLASSES", "3", "MODEL.STRIP_MLP.PATCH_SIZE", "2", "OUTPUT", "mine"])
    loaded, found, _ = load_network(tmp_path / "a.pth", other)
    assert torch.equal(logits(loaded), logits(model))
    assert (found.MODEL.STRIP_MLP, found.MODEL.NUM_CLASSES) == (config.MODEL.STRIP_MLP, 10)
    assert (found.OUTPUT, found.MODEL.NAME, found.DATA.DATASET) == ("mine", other.MODEL.NAME, "imagefolder")
    assert re.search("a.pth holds another network than --cfg describes, and its own is used: MODEL.STRIP_MLP.EMBED_DIM "
                     "8 instead of", caplog.text)


def test_a_network_of_another_kind_fills_no_screen(tmp_path):
    config, model = tiny_network()
    checkpoint.save_file({"model": model.state_dict()}, tmp_path / "a.pth")
    other = load_config(ROOT / "configs/small/smlp_nano_alpha3_patch2_32_cifar10.yaml")
    with pytest.raises(ValueError, match="the weights do not fit") as caught:
        load_network(tmp_path / "a.pth", other)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[1].startswith("  missing: stages.") and lines[10].endswith(" more")


def test_damaged_safetensors_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"hello, this is no header")
    with pytest.raises(checkpoint.CheckpointError, match=r"a\.safetensors: it is damaged or not a safetensors file"):
        load_network(tmp_path / "a.safetensors")


# ---- untrusted checkpoints -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def network():
    return tiny_network()




def timm_checkpoint(path, arguments):
    """A checkpoint of a small ResNet whose config gives timm these arguments."""
    config, model = tiny_network()
    values = to_dict(config)
    values["MODEL"] |= {"TYPE": "timm", "ARCH": "resnet18", "TIMM_KWARGS": arguments}
    checkpoint.save_file({"model": model.state_dict(), "config": values}, path)
    return path


ATTACKS = [  # each with a file of the attacker's in place of FILE
    "{pretrained: true, cache_dir: FOLDER, pretrained_cfg: {url: 'http://127.0.0.1:9/yaml.py', file: null}}",
    "{pretrained: true, pretrained_cfg: {url: 'file://FILE'}}",
    "{pretrained: true, pretrained_cfg: {file: FILE}}",
    "{pretrained: true, pretrained_cfg_overlay: {hf_hub_id: some/body}}",
    "{pretrained_cfg: {hf_hub_id: some/body}}",
    "{pretrained: true}",
    "{checkpoint_path: FILE}",
    "{cache_dir: FOLDER}",
    "{features_only: true}",
    "{scriptable: true}",
    "{act_layer: ../FILE}",
    "{block: 'os.system'}",
    "{stem_width: 1000000}",
    "{layers: [100000, 1, 1, 1]}",
    "{channels: [.inf, 1, 1, 1]}",
    "{stem_width: !!python/object/apply:os.system ['touch marker']}",
    "[pretrained, true]",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_config_cannot_name_files_addresses_or_weights(attack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(3)}, weights)
    text = attack.replace("FILE", str(weights)).replace("FOLDER", str(tmp_path))
    path = timm_checkpoint(tmp_path / "evil.pth", text)
    with Watch([path]) as watch, pytest.raises(InputError, match=r"evil\.pth: its config: MODEL\.TIMM_KWARGS .* --cfg"):
        load_network(path)
    assert watch.events == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evil.pth", "weights.pth"]


@pytest.mark.parametrize("name", ["hf-hub:some/body", "hf_hub:some/body", "local-dir:/etc", "/etc/passwd", "resnet18/x",
                                  "resnet18\x1b[31m"])
def test_a_model_name_is_no_address(name, tmp_path):
    config, model = tiny_network()
    values = to_dict(config)
    values["MODEL"] |= {"TYPE": "timm", "ARCH": name}
    save_network(tmp_path / "evil.pth", config, model, config=values)
    with Watch([tmp_path / "evil.pth"]) as watch, pytest.raises(InputError, match=r"evil\.pth: ") as caught:
        load_network(tmp_path / "evil.pth")
    assert watch.events == [] and str(caught.value).isprintable()


def test_the_watch_sees_what_it_should(tmp_path):
    """Without it the tests above could not fail."""
    with Watch([tmp_path / "allowed"]) as watch:
        (tmp_path / "allowed").write_text("")
        (tmp_path / "other").write_text("")
        socket.socket().close()
        (tmp_path / "other").unlink()
    assert [event for event, _ in watch.events] == ["open", "socket.__new__", "os.remove"]


def test_only_the_architecture_is_taken(network):
    config, _ = network
    values = to_dict(config)
    values["OUTPUT"], values["DATA"]["DATA_PATH"], values["WANDB_PROJECT"] = "/etc", "/etc", "theirs"
    values["MODEL"] |= {"PRETRAINED": "/etc/passwd", "RESUME": "/etc/passwd"}
    values["MODEL"]["STRIP_MLP"] |= {"FAST": False, "FORM": "triton"}  # of older versions
    values["TRAIN"] = {"NO_SUCH_KEY": 3}
    chosen = architecture(values, "a test")
    assert chosen.MODEL.STRIP_MLP == config.MODEL.STRIP_MLP and chosen.DATA.IMG_SIZE == 16
    assert (chosen.OUTPUT, chosen.DATA.DATA_PATH, chosen.WANDB_PROJECT) == ("output", "", "")
    assert (chosen.MODEL.PRETRAINED, chosen.MODEL.RESUME, chosen.TRAIN.EPOCHS) == ("", "", 300)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("NUM_CLASSES", 10**10, r"MODEL\.NUM_CLASSES is 10000000000; a checkpoint may set numbers up to 1000000"),
    ("NUM_CLASSES", float("nan"), r"MODEL\.NUM_CLASSES is nan"),
    ("STRIP_MLP", {"DEPTHS": [1, 1, 10**6, 1]}, r"MODEL\.STRIP_MLP\.DEPTHS is 1000000; .* numbers up to 256"),
    ("STRIP_MLP", {"EMBED_DIM": 65536, "DEPTHS": [1, 1, 1, 1]}, r"a network of [0-9,]{15,} parameters and buffers"),
    ("STRIP_MLP", {"DEPTHS": list(range(17))}, r"MODEL\.STRIP_MLP\.DEPTHS has 17 entries"),
    ("STRIP_MLP", 3, r"MODEL\.STRIP_MLP is a group of keys"),
    ("NAME", "x" * 10**6, r"MODEL\.NAME is 'xxx"),
    ("NAME", torch.zeros(3), r"MODEL\.NAME is tensor"),
    ("SWIN", {}, r"MODEL\.SWIN is a setting of Swin-Transformer's"),
])
def test_sizes_are_bounded(key, value, message, network, tmp_path):
    config, model = network
    values = to_dict(config)
    if isinstance(value, dict) and key in values["MODEL"]:
        value = values["MODEL"][key] | value
    values["MODEL"][key] = value
    save_network(tmp_path / "a.pth", config, model, config=values)
    with pytest.raises(InputError, match=message) as caught:
        load_network(tmp_path / "a.pth")
    assert len(str(caught.value)) < 500


def test_weights_are_not_stretched_to_the_size_that_a_checkpoint_claims(network, tmp_path):
    """A megabyte of weights with an image size of 4096 once took minutes and gigabytes."""
    config, model = network
    values = to_dict(config)
    values["DATA"]["IMG_SIZE"] = 64
    path = save_network(tmp_path / "a.pth", config, model, config=values)
    with pytest.raises(InputError, match=r"shape: stages\.0\.0\.token_mixing\.cgsmm\.row_position\.table"):
        load_network(path)
    assert load_network(path, load_config(DIGITS, [*TINY, "DATA.IMG_SIZE", "32"]))[1].DATA.IMG_SIZE == 32


def test_check_size_counts_parameters_and_buffers():
    with torch.device("meta"):
        outline = torch.nn.Linear(50_000, 40_000 - 1)
    check_size(outline)
    outline.register_buffer("more", torch.empty(40_000, device="meta"))
    with pytest.raises(InputError, match=r"2,000,029,999 parameters and buffers; .* up to 2,000,000,000"):
        check_size(outline)


# ---- entries ---------------------------------------------------------------------------------------

def nested_pairs(levels):
    """A value of 2**levels entries in the memory of a few."""
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def itself():
    value = {}
    value["self"] = value
    return value


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


ODD = {
    "pairs": (lambda: nested_pairs(30), "more than 10000 entries"),
    "many pairs": (lambda: nested_pairs(60), "nested more than 32 deep"),
    "itself": (itself, "nested more than 32 deep"),
    "deep": (lambda: deep(1000), "nested more than 32 deep"),
    "stretched tensor": (lambda: torch.zeros(1).expand(10**12), "larger than the file|repeats its numbers"),
}


@pytest.mark.parametrize(("make", "message"), ODD.values(), ids=ODD.keys())
def test_odd_entries_are_refused(make, message, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_ENTRIES", 10_000)  # for the test to be quick
    value = make()
    with pytest.raises(InputError, match=message):
        plain({"entry": value}, 10**6)
    with contextlib.suppress(RecursionError):  # which cannot be saved
        torch.save({"entry": value}, tmp_path / "a.pth")
        with pytest.raises(checkpoint.CheckpointError, match=rf"a\.pth.*({message})"):
            checkpoint.load_file(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [
    {1, 2}, 2**64, torch.empty(10, device="meta"), torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(),
    torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
], ids=repr)
def test_odd_entries_are_inert(value, tmp_path):
    torch.save({"entry": value, "good": 3, (1, 2): 3, "\x1b[31m": 3, "x" * 10**5: 3}, tmp_path / "a.pth")
    found = checkpoint.load_file(tmp_path / "a.pth")
    assert found.keys() == {"entry", "good"} and isinstance(found["entry"], checkpoint.Unknown)


def test_tensors_are_freed_of_all_but_their_numbers():
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "an attribute"
    value, = plain((parameter,), 100)
    assert type(value) is torch.Tensor and not value.requires_grad and not hasattr(value, "note")
    assert torch.equal(value, torch.arange(3.0))


def test_shared_entries_are_kept():
    weights = torch.zeros(5)
    assert plain({"a": weights, "b": [weights, (None, True, 1.5, "x")]}, 40).keys() == {"a", "b"}


# ---- class names -----------------------------------------------------------------------------------

def test_class_names():
    assert class_names(None, 2) == ["0", "1"] and class_names(["a", "b"], 2) == ["a", "b"]
    for names in ({"a": 1}, "ab", 3, ["a", 3], ["a", "b" * 10**6], torch.zeros(2)):
        with pytest.raises(InputError, match="its classes are .*, not a list of names"):
            class_names(names, 2)
    with pytest.raises(InputError, match="it has 1 classes but MODEL.NUM_CLASSES is 2"):
        class_names(["a"], 2)


def test_a_safetensors_file_too_is_bounded(tmp_path, network):
    config, model = network
    for about in ("[" * 10_000 + "]" * 10_000, yaml.safe_dump({"MODEL": 3}), '{"MODEL": {"NUM_CLASSES": 1e999}}'):
        safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors", {"config": about})
        with pytest.raises(InputError, match=r"a\.safetensors"):
            load_network(tmp_path / "a.safetensors")
