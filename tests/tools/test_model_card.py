"""Sharing a network: the folder that tools/export.py writes, and every way in which it loads back."""

import hashlib
import json
import shutil

import huggingface_hub
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config

import checkpoint
import main
import plots
from config import load_config, to_dict
from data.transforms import build_transform
from inference import WEIGHTS, load_network, weights_file
from models import build_model
from tests.helpers import DIGITS, TINY, arguments, folder, save_network, tiny_network
from tools import export, predict
from tools.model_card import model_card
from utils import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def images(size=16):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of an evaluated run, its network, and what was exported of it."""
    root = tmp_path_factory.mktemp("shared")
    config, model = tiny_network()
    private = load_config(DIGITS, [*TINY, "DATA.DATA_PATH", "/private"])
    path = save_network(root / "best.pth", private, model)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    result = {"acc1": 91.234, "acc5": 99.5, "images": 360}
    (root / "eval.json").write_text(json.dumps({"eval": result, "sha256": sha256}))
    (root / "config.yaml").write_text(yaml.safe_dump(to_dict(private)))
    about = {"git_commit": COMMIT, "effective_batch": 200, "training_images": 1437}
    (root / "run.yaml").write_text(yaml.safe_dump(about))
    assert export.main([str(path), str(root / "hub"), "--format", "hub"]) == 0
    return path, model, root / "hub"


@pytest.fixture
def the_hub(shared, monkeypatch):
    """A Hub that holds the folder as ``someone/digits``, at any revision; gives the list of what was asked of it."""
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if repository != "someone/digits":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no such repository\nand more")
        return str(shared[2] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


# ---- it loads back -------------------------------------------------------------------------------

def test_timm_loads_the_folder(shared):
    _, model, exported = shared
    net = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(net(images()), model(images()))
    other = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=3)
    assert other.head.weight.shape[0] == 3
    assert torch.equal(other.stem.weight, model.stem.weight)
    assert net.pretrained_cfg["label_names"] == [f"digit {i}" for i in range(10)]


@pytest.mark.parametrize("crop", [True, False])
def test_timm_prepares_images_as_this_project_does(crop, tmp_path):
    config, model = tiny_network()
    config = load_config(DIGITS, [*TINY, "TEST.CROP", crop])
    save_network(tmp_path / "best.pth", config, model)
    assert export.main([str(tmp_path / "best.pth"), str(tmp_path / "hub"), "--format", "hub"]) == 0
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}")
    picture = Image.effect_noise((50, 30), 80).convert("RGB")
    found = create_transform(**resolve_data_config({}, model=net))(picture)
    torch.testing.assert_close(found, build_transform(config)(picture))


@pytest.mark.parametrize("name", ["folder", "hf-hub:someone/digits", "hf-hub:someone/digits@v2"])
def test_predict_and_eval_take_it_where_they_take_a_file(name, shared, the_hub, tmp_path, capsys):
    path, model, exported = shared
    name = str(exported) if name == "folder" else name
    net, config, classes = load_network(name)
    with torch.no_grad():
        assert torch.equal(net(images()), model(images()))
    picture = tmp_path / "picture.png"
    Image.effect_noise((16, 16), 80).save(picture)
    outputs = []
    for source in (str(path), name):
        assert predict.main([source, str(picture), "--json"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    results = []
    for tag, source in (("file", str(path)), ("name", name)):
        assert main.main(arguments(tmp_path, tag=tag, flags=["--eval", "--resume", source])) == 0
        results.append(json.loads((folder(tmp_path, tag) / "eval.json").read_text()))
    assert results[0]["eval"] == results[1]["eval"]
    assert results[1]["sha256"] == hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    revision = name.partition("@")[2] or None
    assert set(the_hub) == ({("someone/digits", "model.safetensors", revision)} if ":" in name else set())


def test_pretrained_takes_it(shared, the_hub):
    config, model = tiny_network(seed=3)
    config.defrost()
    config.MODEL.PRETRAINED = "hf-hub:someone/digits"
    main._load_pretrained(config, model)
    with torch.no_grad():
        assert torch.equal(model(images()), shared[1](images()))


@pytest.mark.parametrize("name", ["smlpnet_tiny", "wave_mlp_small", "resnet18"])
def test_timm_s_own_architectures(name, tmp_path, capsys):
    kwargs = {
        "smlpnet_tiny": "{embed_dim: 8, depths: [1, 1, 1, 1]}",
        "wave_mlp_small": "{embed_dims: [8, 8, 8, 8], depths: [1, 1, 1, 1]}",
        "resnet18": "{channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}",
    }[name]
    opts = ["MODEL.TYPE", "timm", "MODEL.ARCH", name, "MODEL.TIMM_KWARGS", kwargs, "DATA.IMG_SIZE", 32]
    config = load_config(DIGITS, opts)
    torch.manual_seed(0)
    net = build_model(config).eval()
    save_network(tmp_path / "best.pth", config, net)
    assert export.main([str(tmp_path / "best.pth"), str(tmp_path / "hub"), "--format", "hub"]) == 0
    assert "(hub); read back, its outputs differ by at most" in capsys.readouterr().out
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images(32)), net(images(32)))
    assert ("import models" in (tmp_path / "hub" / "README.md").read_text()) == (name != "resnet18")


# ---- what it says --------------------------------------------------------------------------------

def test_model_card(shared):
    path, _, exported = shared
    card = (exported / "README.md").read_text()
    evaluated, weights = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, exported / WEIGHTS))
    for fact in (
        "license: mit", "library_name: timm", "| data | digits, 1437 training images, 10 classes |",
        f"top-1 91.23 %, top-5 99.50 % of 360 images, measured on the checkpoint with SHA-256 `{evaluated}`",
        f"| commit | {COMMIT} |", f"| SHA-256 of the weights | `{weights}` |", "| seed | 0 |",
        "2 epochs, adamw, 200 images per update", "import models", 'timm.create_model("hf-hub:USER/NAME"',
    ):
        assert fact in card, fact
    assert sorted(file.name for file in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert not [file for file in exported.iterdir() if b"/private" in file.read_bytes()]


def test_another_file_s_evaluation_is_not_claimed(shared, tmp_path):
    path, _, _ = shared
    (tmp_path / "eval.json").write_text((path.parent / "eval.json").read_text())
    content = checkpoint.load_file(path) | {"epoch": 5}
    checkpoint.save_file(content, tmp_path / "best.pth")
    assert export.main([str(tmp_path / "best.pth"), str(tmp_path / "hub"), "--format", "hub"]) == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| accuracy | not evaluated; run `python main.py --eval`" in card and "91.23" not in card
    assert "| commit | not recorded |" in card and "| recipe | not recorded |" in card


def test_what_the_training_logged_is_the_accuracy_of_a_file_that_was_not_evaluated(trained, tmp_path):
    """That of the file's own weights and update: not of the best epoch for the last checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(folder(trained), run, symlinks=True, ignore=shutil.ignore_patterns("eval.json"))  # another test's
    records = plots.read_metrics(run)
    for path in (run / "best.pth", *run.glob("ckpt_step_*.pth")):
        content = checkpoint.load_file(path)
        kind = "eval_ema" if content["is_average_best"] else "eval"
        record, = [r for r in records if (r["kind"], r["step"]) == (kind, content["step"])]
        target = tmp_path / path.stem
        assert export.main([str(path), str(target), "--format", "hub"]) == 0
        fact = f"| accuracy | top-1 {record['acc1']:.2f} % of the validation images, logged by the training after "
        assert f"{fact}{record['epoch'] + 1} epochs |" in (target / "README.md").read_text()


@pytest.mark.parametrize("is_average_best", [True, False])
def test_an_evaluated_file_s_accuracy_is_that_of_the_network_that_was_exported(tmp_path, is_average_best):
    config, model = tiny_network()
    path = save_network(tmp_path / "best.pth", config, model, model_ema=model.state_dict(),
                        is_average_best=is_average_best)
    results = {kind: {"acc1": acc1, "acc5": 99.0, "images": 40} for kind, acc1 in (("eval", 97.5), ("eval_ema", 12.5))}
    report = results | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "eval.json").write_text(json.dumps(report))
    assert export.main([str(path), str(tmp_path / "hub"), "--format", "hub"]) == 0
    fact = f"| accuracy | top-1 {12.5 if is_average_best else 97.5:.2f} %"
    assert fact in (tmp_path / "hub" / "README.md").read_text()


def test_odd_files_beside_the_checkpoint(shared, tmp_path):
    """A folder that others made adds no line to the card, and ends in an error where it holds no run."""
    path, _, exported = shared
    shutil.copy(path, tmp_path / "best.pth")
    config, weights = load_network(path)[1], exported / WEIGHTS
    (tmp_path / "run.yaml").write_text('git_commit: "a|b\\n# title"\n')
    card = model_card(tmp_path / "best.pth", config, weights)
    assert r"| commit | a\|b\n# title |" in card
    no_figures = json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    for name, text in (("run.yaml", "[1]"), ("run.yaml", "a: &a [*a]"), ("eval.json", "[" * 100_000),
                       ("eval.json", "3"), ("eval.json", no_figures)):
        (tmp_path / "run.yaml").write_text("{}")
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name):
            model_card(tmp_path / "best.pth", config, weights)


# ---- what is refused -----------------------------------------------------------------------------

def test_names_that_lead_nowhere(shared, the_hub, tmp_path, capsys):
    with pytest.raises(InputError, match="hf-hub:no/such cannot be downloaded .no such repository.; check the name"):
        load_network("hf-hub:no/such")
    with pytest.raises(InputError, match="is a folder without model.safetensors or best.pth"):
        load_network(tmp_path)
    assert predict.main(["hf-hub:no/such", str(tmp_path)]) == 2


def test_only_a_hub_name_downloads(shared, the_hub, tmp_path):
    """Neither a file nor a folder is asked for on the Hub, whatever it is called."""
    odd = tmp_path / "someone" / "digits"
    odd.parent.mkdir()
    shutil.copy(shared[0], odd)
    assert weights_file(odd) == odd
    assert weights_file("someone/digits").parts == ("someone", "digits")
    assert weights_file(shared[2]) == shared[2] / "model.safetensors"
    assert the_hub == []


def test_an_ablated_network_is_refused(tmp_path, capsys):
    config = load_config(DIGITS, ["MODEL.STRIP_MLP.SHORTCUTS", False])
    save_network(tmp_path / "best.pth", config, build_model(config))
    assert export.main([str(tmp_path / "best.pth"), str(tmp_path / "hub"), "--format", "hub"]) == 2
    assert "an ablated Strip-MLP" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_a_run_s_folder_stands_for_its_best_checkpoint(tmp_path, caplog):
    with pytest.raises(InputError, match="is a folder without model.safetensors or best.pth"):
        weights_file(tmp_path)
    (tmp_path / "best.pth").touch()
    assert weights_file(tmp_path) == tmp_path / "best.pth"
