"""Fine-tuning through the command line: frozen stages, layer decay, another input size."""

import json
import re
import shutil

import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

import checkpoint
import main
from config import flat_keys, load_config
from data import build_val_loader
from data.datasets import read_digits
from engine import Precision, evaluate
from models import StripMLPNet, adapt_size, build_model, load_strict, to_released_state_dict
from tests.helpers import DIGITS, TINY, arguments, differences, few_digits, folder
from tests.processes import ROOT, run, torchrun

FROZEN = ("stem", "stages.0", "stages.1", "merging.0")
OPTIONS = ("TRAIN.FREEZE_STAGES", 2, "TRAIN.LAYER_DECAY", 0.5, "DATA.BATCH_SIZE", 80)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of a network of 7 classes and 32 pixels, its statistics not those of a new one."""
    path = tmp_path_factory.mktemp("pretrained") / "seven.pth"
    torch.manual_seed(5)
    model = build_model(load_config(DIGITS, [*TINY, "MODEL.NUM_CLASSES", 7, "DATA.IMG_SIZE", 32]))
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory):
    """Two epochs of 3 updates from it, 10 classes at 16 pixels, two stages frozen."""
    output = tmp_path_factory.mktemp("finetuned")
    assert main.main(arguments(output, *OPTIONS, flags=["--pretrained", str(pretrained)])) == 0
    return output


def expected_weights(pretrained):
    model = build_model(load_config(DIGITS, TINY))
    return adapt_size(checkpoint.load_file(pretrained)["model"], model)


def check_frozen(content, pretrained):
    weights = expected_weights(pretrained)
    for part in ("model", "model_ema"):
        for key, value in content[part].items():
            if not key.startswith("head") and not key.endswith(("grn.gamma", "grn.beta")):
                assert torch.equal(value, weights[key]) is key.startswith(FROZEN), f"{part} {key}"


def test_frozen_stages_and_layer_decay(pretrained, finetuned):
    content = checkpoint.load_file(folder(finetuned) / "ckpt_step_00000006.pth")
    check_frozen(content, pretrained)
    scales = {group["lr_scale"] for group in content["optimizer"]["param_groups"]}
    assert scales == {1.0, 0.5, 0.25}  # head, stage 4, stage 3; the rest is frozen
    log = (folder(finetuned) / "log_rank0.txt").read_text()
    assert "weights are for another input size" in log and "re-initialised: head.weight, head.bias" in log
    assert "freezes newly initialised weights" not in log
    frozen = sum(value.numel() for key, value in expected_weights(pretrained).items()
                 if key.startswith(FROZEN) and "running" not in key and "batches" not in key)
    assert f"frozen_parameters: {frozen}\n" in (folder(finetuned) / "run.yaml").read_text()
    assert f"M parameters, {frozen / 1e6:.2f} M of them frozen" in log


def test_evaluation_at_another_size_says_so_once(finetuned, tmp_path, capsys):
    """Though a checkpoint holds two networks, the trained one and its average; and both are adapted."""
    path = folder(finetuned) / "ckpt_step_00000006.pth"
    flags = ["--eval", "--resume", str(path)]
    assert main.main(arguments(tmp_path, "DATA.IMG_SIZE", 32, flags=flags)) == 0
    assert capsys.readouterr().out.count("weights are for another input size") == 1
    results = json.loads((folder(tmp_path) / "eval.json").read_text())
    data = ["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", str(few_digits())]
    config = load_config(DIGITS, [*TINY, *data, "DATA.IMG_SIZE", 32])
    model, val_loader = build_model(config), build_val_loader(config)
    for name, weights in (("eval", "model"), ("eval_ema", "model_ema")):
        load_strict(model, adapt_size(checkpoint.load_file(path)[weights], model))
        expected = evaluate(model, val_loader, Precision("fp32", torch.device("cpu")))
        assert results[name] == pytest.approx(expected)


def test_resuming_a_fine_tuning_changes_no_bit(pretrained, finetuned, tmp_path):
    target = folder(tmp_path)
    target.mkdir(parents=True)
    shutil.copy(folder(finetuned) / "ckpt_step_00000003.pth", target)
    assert main.main(arguments(tmp_path, *OPTIONS, flags=["--pretrained", str(pretrained)])) == 0
    a, b = (checkpoint.load_file(folder(output) / "ckpt_step_00000006.pth") for output in (finetuned, tmp_path))
    for content in (a, b):
        content.pop("config")
    assert differences(a, b) == []


@pytest.mark.slow
def test_frozen_on_three_processes(pretrained, tmp_path):
    """Where averaging equal statistics over the processes would change their last bits."""
    result = run([*torchrun(3), "main.py", *arguments(tmp_path, *OPTIONS, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 30,
                                                      flags=["--pretrained", pretrained])])
    assert result.returncode == 0, result.stderr
    check_frozen(checkpoint.newest_checkpoint(folder(tmp_path))[1], pretrained)


def test_freezing_new_weights_is_warned_of(tmp_path, capsys):
    assert main.main(arguments(tmp_path, *OPTIONS, "TRAIN.EPOCHS", 1)) == 0
    assert "WARNING: TRAIN.FREEZE_STAGES freezes newly initialised weights" in capsys.readouterr().out


def test_the_guide(tmp_path):
    """The Python of docs/finetune.md runs as it stands, at smaller sizes; the keys that it names exist."""
    guide = (ROOT / "docs" / "finetune.md").read_text()
    path = tmp_path / "strip_mlp_tiny.pth"
    torch.save({"model": to_released_state_dict(timm.create_model("strip_mlp_tiny", img_size=32).state_dict())}, path)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.S | re.M))
    for there, here in (("strip_mlp_tiny.pth", path), ("(512, 768)", "(64, 96)"), ("img_size=384", "img_size=64")):
        assert there in code
        code = code.replace(there, str(here))
    names = {"images": torch.zeros(1, 3, 64, 96)}
    exec(code, names)
    assert [names[stage].shape[1] for stage in ("c2", "c3", "c4", "c5")] == [80, 160, 320, 640]
    assert names["net"].num_classes == 12 and len(names["optimizer"].param_groups) > 30
    keys = set(re.findall(r"\b(?:DATA|MODEL|TRAIN)\.[A-Z_.]+[A-Z]", guide))
    assert len(keys) > 8 and keys <= flat_keys(load_config()).keys()


@pytest.mark.slow
def test_another_size_on_a_trained_network(tmp_path):
    """Trained at 32 pixels: evaluated at 48x48 and 32x48 far above chance (10 %), and recovered by one epoch there."""
    def command(tag, *opts, flags=()):
        assert main.main(["--cfg", str(DIGITS), "--output", str(tmp_path), "--tag", tag, "--device", "cpu", *flags,
                          "--opts", "DATA.NUM_WORKERS", "0", *map(str, opts)]) == 0
        return folder(tmp_path, tag)

    def accuracy(tag, size, path):
        results = command(tag, "DATA.IMG_SIZE", size, flags=["--eval", "--resume", str(path)])
        return json.loads((results / "eval.json").read_text())["eval"]["acc1"]

    trained = checkpoint.newest_checkpoint(command("trained", "TRAIN.EPOCHS", 8))[0]
    at_32, at_48 = accuracy("at_32", 32, trained), accuracy("at_48", 48, trained)
    finetuned = command("finetuned", "DATA.IMG_SIZE", 48, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0,
                        "TRAIN.BASE_LR", 5e-4, flags=["--pretrained", str(trained)])
    recovered = accuracy("recovered", 48, checkpoint.newest_checkpoint(finetuned)[0])

    net = StripMLPNet((32, 48), 2, num_classes=10, embed_dim=32, depths=(1, 1, 2, 1)).eval()
    net.load_state_dict(checkpoint.load_file(trained)["model"])
    images, labels, _ = read_digits("val")
    transform = transforms.Compose([
        transforms.Resize((32, 48), transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ])
    pictures = torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])
    with torch.no_grad():
        wide = 100 * (net(pictures).argmax(1) == torch.as_tensor(labels)).double().mean().item()
    print(f"top-1 at 32: {at_32:.1f}, at 48: {at_48:.1f}, at 32x48: {wide:.1f}; an epoch at 48: {recovered:.1f}")
    assert at_32 > 95 and at_48 > 50 and wide > 80
    assert recovered > at_32 - 2
