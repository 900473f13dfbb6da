"""weights/strip_mlp_nano_cifar10 loads in every way that the documents name, and says of a photo what it is."""

import hashlib
import json
import re
import shutil

import pytest
import safetensors
import timm
import torch

import checkpoint
import main
import models  # noqa: F401  (registers the networks)
from config import load_config
from data.images import load_image
from data.transforms import build_transform
from inference import load_network
from tests.helpers import DIGITS, few_digits
from tests.processes import ROOT
from tools import predict

FOLDER = ROOT / "weights/strip_mlp_nano_cifar10"
CONFIG = ROOT / "configs/small/smlp_nano_alpha3_patch2_32_cifar10.yaml"
PHOTO = ROOT / "docs/images/cat.jpg"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def network():
    return load_network(FOLDER)


def test_it_recognises_a_cat(network, capsys):
    net, config, classes = network
    with torch.inference_mode():
        probabilities = net(build_transform(config)(load_image(PHOTO))[None]).softmax(dim=1)[0]
    assert classes[probabilities.argmax()] == "cat"
    assert predict.main([str(FOLDER), str(PHOTO)]) == 0
    assert capsys.readouterr().out.startswith(f"{PHOTO}: cat {probabilities.max():.1%}")


def test_timm(network):
    """It builds the same network and prepares images in the same way."""
    net, config, classes = network
    other = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_data_config({}, model=other))
    picture = load_image(PHOTO)
    images = build_transform(config)(picture)[None]
    torch.testing.assert_close(prepare(picture)[None], images, rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(other(images), net(images))
    assert other.pretrained_cfg["label_names"] == classes


def test_the_config_is_that_of_the_network(network):
    assert network[1].MODEL.STRIP_MLP == load_config(CONFIG).MODEL.STRIP_MLP


def test_evaluation(network, tmp_path, capsys):
    """Of ten classes with the same photo in each, one is right."""
    for name in network[2]:
        (tmp_path / "val" / name).mkdir(parents=True)
        shutil.copy(PHOTO, tmp_path / "val" / name)
    assert main.main(["--cfg", str(CONFIG), "--eval", "--resume", str(FOLDER), "--data-path", str(tmp_path),
                      "--output", str(tmp_path), "--device", "cpu", "--opts", "DATA.DATASET", "imagefolder"]) == 0
    path, = tmp_path.rglob("eval.json")
    report = json.loads(path.read_text())
    assert report["eval"]["acc1"] == 10
    assert report["sha256"] == hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()


def test_start_of_a_training(network, tmp_path):
    """All of it but the head is frozen here, and so is unchanged at the end."""
    assert main.main(["--cfg", str(DIGITS), "--pretrained", str(FOLDER), "--output", str(tmp_path), "--device", "cpu",
                      "--data-path", str(few_digits()), "--opts", "DATA.DATASET", "imagefolder",
                      "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "80", "MODEL.STRIP_MLP.NUM_PATCHES", "4",
                      "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.FREEZE_STAGES", "4"]) == 0
    path, = tmp_path.rglob("best.pth")
    trained, start = checkpoint.load_file(path)["model"], network[0].state_dict()
    changed = {key.split(".")[0] for key in start if not torch.equal(trained[key], start[key])}
    assert changed == {"head"}


def test_size_and_card():
    """16 bits a weight; the card names this file, and says how it was trained and evaluated."""
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size < 3e6
    with safetensors.safe_open(path, "pt") as file:
        kinds = {tensor.dtype for tensor in map(file.get_tensor, file.keys()) if tensor.ndim > 1}
    assert kinds == {torch.float16}
    assert hashlib.sha256(path.read_bytes()).hexdigest() in CARD
    assert re.search(r"top-1 \d\d\.\d\d %, .* of 10000 images", CARD)
    assert len(re.findall(r"`[0-9a-f]{64}`", CARD)) >= 2  # of the weights, and of the predictions
