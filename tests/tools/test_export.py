import json
import re
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

import checkpoint
from config import load_config, to_dict
from data.transforms import build_transform
from inference import architecture, load_network
from models import build_model, to_released_state_dict
from tests.helpers import DIGITS, TINY, differences, save_network, tiny_network
from tests.processes import ROOT
from tools import export

CLASSES = [f"digit {label}" for label in range(10)]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint whose average is what counts, with that network."""
    config, average = tiny_network()
    path = tmp_path_factory.mktemp("network") / "best.pth"
    return save_network(path, config, tiny_network(seed=1)[1], model_ema=average.state_dict()), config, average


def logits(model, batch):
    images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        return images, model(images)


@pytest.fixture(scope="module")
def onnx_file(network, tmp_path_factory):
    """The network in ONNX, for images of which the centre is cropped."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if torch.__version__ < (2, 8):
        pytest.skip("PyTorch 2.6 cannot export the network to ONNX")
    folder = tmp_path_factory.mktemp("onnx")
    save_network(folder / "best.pth", load_config(DIGITS, [*TINY, "TEST.CROP", "True"]), network[2])
    assert export.main([str(folder / "best.pth"), str(folder / "model.onnx")]) == 0
    return folder / "model.onnx"


def test_onnx(network, onnx_file):
    """onnxruntime gives the network's logits for any batch size; the file says how to prepare images."""
    import onnxruntime
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        images, expected = logits(network[2], batch)
        found, = session.run(["logits"], {"images": images.numpy()})
        assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == CLASSES
    assert json.loads(about["preprocessing"]) == {
        "input_size": [3, 16, 16], "crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert {file.name for file in onnx_file.parent.iterdir()} == {"best.pth", "model.onnx"}  # the weights too are in it


def test_onnx_needs_a_newer_pytorch(network, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.6.0"))
    assert export.main([str(network[0]), str(tmp_path / "a.onnx")]) == 2
    assert "export.py: ONNX export needs PyTorch 2.8 or newer; this is 2.6.0\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_torch_export(network, tmp_path):
    """For any batch size."""
    path, config, model = network
    assert export.main([str(path), str(tmp_path / "a.pt2")]) == 0
    about = {"classes": "", "preprocessing": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=about)
    for batch in (1, 2, 7):
        images, expected = logits(model, batch)
        assert_close(program.module()(images), expected, rtol=1e-5, atol=1e-5)
    assert json.loads(about["classes"]) == CLASSES and json.loads(about["preprocessing"])["input_size"] == [3, 16, 16]


def test_the_page_s_onnxruntime_example(network, onnx_file, tmp_path, monkeypatch, capsys):
    """It needs nothing of this repository, and gives what the network gives."""
    Image.linear_gradient("L").resize((300, 200)).save(onnx_file.with_name("photo.jpg"))  # smooth: both resize alike
    monkeypatch.chdir(onnx_file.parent)
    (code,) = re.findall(r"```python\n(import json\n.*?)```", (ROOT / "docs" / "tools.md").read_text(), re.S)
    assert len(code.splitlines()) <= 12
    exec(code, names := {})
    transform = build_transform(load_config(DIGITS, [*TINY, "TEST.CROP", "True"]))
    with torch.inference_mode():
        expected = network[2](transform(Image.open("photo.jpg").convert("RGB"))[None])
    assert_close(torch.from_numpy(names["logits"]), expected, rtol=0, atol=0.02)
    assert capsys.readouterr().out == f"digit {expected.argmax()}\n"


@pytest.mark.parametrize(("name", "flags"), [("a.safetensors", []), ("a.pth", ["--format", "native"])])
def test_own_formats_hold_all_that_a_network_needs(name, flags, network, tmp_path):
    path, config, model = network
    assert export.main([str(path), str(tmp_path / name), *flags]) == 0
    loaded, loaded_config, classes = load_network(tmp_path / name)
    assert differences(dict(loaded.state_dict()), dict(model.state_dict())) == []
    assert loaded_config == architecture(to_dict(config), "the config") and classes == CLASSES


def test_safetensors_hold_plain_weights(network, tmp_path):
    """As timm and others read them."""
    assert export.main([str(network[0]), str(tmp_path / "a.safetensors")]) == 0
    weights = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert differences(weights, dict(network[2].state_dict())) == []


def test_in_16_bits(network, tmp_path):
    """Every weight is stored in float16 if it has several dimensions, and used in float32, rounded."""
    path, _, model = network
    assert export.main([str(path), str(tmp_path / "a.safetensors"), "--half"]) == 0
    stored = safetensors.torch.load_file(tmp_path / "a.safetensors")
    expected = {key: value.half() if value.ndim > 1 else value for key, value in model.state_dict().items()}
    assert differences(stored, expected) == [] and stored["head.weight"].dtype == torch.float16
    loaded, _, _ = load_network(tmp_path / "a.safetensors")
    assert loaded.head.weight.dtype == torch.float32 and torch.equal(loaded.head.weight.half(), stored["head.weight"])
    images, found = logits(loaded, 7)
    assert_close(found, model(images), rtol=1e-2, atol=1e-2)


def test_to_the_released_format_and_back(network, tmp_path):
    path, config, model = network
    assert export.main([str(path), str(tmp_path / "released.pth"), "--format", "released"]) == 0
    content = checkpoint.load_file(tmp_path / "released.pth")
    expected = to_released_state_dict(model.state_dict())
    assert "blocks1.0.token_mixing.smlp_block.proj_h.weight" in expected
    assert differences(content["model"], expected) == []
    torch.save({"model": expected}, tmp_path / "bare.pth")  # as others publish it
    (tmp_path / "config.yaml").write_text(json.dumps(to_dict(config)))
    flags = ["--format", "native", "--cfg", str(tmp_path / "config.yaml")]
    assert export.main([str(tmp_path / "bare.pth"), str(tmp_path / "back.pth"), *flags]) == 0
    content = checkpoint.load_file(tmp_path / "back.pth")
    assert differences(content["model"], dict(model.state_dict())) == [] and content["config"] == to_dict(config)


def test_timm_models(tmp_path, capsys):
    config = load_config(opts=["MODEL.TYPE", "timm", "MODEL.ARCH", "test_resnet", "MODEL.NUM_CLASSES", "10",
                               "MODEL.DROP_PATH_RATE", "0", "DATA.IMG_SIZE", "32"])
    path = save_network(tmp_path / "a.pth", config, build_model(config).eval())
    assert export.main([str(path), str(tmp_path / "a.pt2")]) == 0
    assert export.main([str(path), str(tmp_path / "b.pth"), "--format", "released"]) == 2
    assert "the released code supports Strip-MLP only; this network is a ResNet" in capsys.readouterr().err


def test_the_difference_is_the_largest_against_the_largest_logit():
    class Head(torch.nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    one = Head(1.0, -8.0)
    assert export.largest_difference(one, one, (3, 4, 4)) == 0
    assert export.largest_difference(one, Head(1.5, -8.25), (3, 4, 4)) == 0.5 / 8
    assert export.largest_difference(Head(0.1, 0.2), Head(0.1, 0.3), (3, 4, 4)) == pytest.approx(0.1)
    last_image_wrong = lambda images: one(images) + (torch.arange(len(images)) == 2)[:, None]  # noqa: E731
    assert export.largest_difference(one, last_image_wrong, (3, 4, 4)) == 1 / 8


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_file_with_other_outputs_is_not_written(error, network, tmp_path, monkeypatch, capsys):
    def write(network, path):
        path.write_text("")
        return lambda images: network.model(images) + error

    monkeypatch.setitem(export.WRITERS, "native", write)
    assert export.main([str(network[0]), str(tmp_path / "a.pth"), "--format", "native"]) == 2
    assert "a.pth was not written: its outputs differ from the network's by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NETWORK", "a.foo"], "a.foo: its extension does not determine the format; add --format onnx or "),
        (["NETWORK", "a.pth"], "a.pth: its extension does not determine the format; add --format released or native"),
        (["NETWORK", "a.pth", "--format", "onnx"], "must end in .onnx"),
        (["NETWORK", "a.pt2", "--half"], "--half is for safetensors and hub, not for torch-export"),
        (["NETWORK", "here.pt2"], "here.pt2 already exists; remove it or choose another name"),
        (["NETWORK", "gone/a.pt2"], "gone is not a writable folder"),
        (["gone.pth", "a.pt2"], "checkpoint gone.pth does not exist"),
        (["here.pt2", "a.pt2"], "here.pt2 is damaged or not a checkpoint"),
        (["bare.pth", "a.pt2"], "bare.pth: it holds no config; use --cfg to name the config that it was trained with"),
    ],
)
def test_bad_input(arguments, message, network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.pt2").write_text("")
    torch.save({"model": network[2].state_dict()}, "bare.pth")
    assert export.main([str(network[0]) if word == "NETWORK" else word for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("export.py: ") and err.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"here.pt2", "bare.pth"}


def test_missing_packages_are_named(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export.main([str(network[0]), str(tmp_path / "a.onnx")]) == 2
    err = capsys.readouterr().err
    assert "onnx needs more packages (" in err and err.endswith("): pip install onnx onnxscript onnxruntime\n")
