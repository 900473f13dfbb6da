"""The detector example: scenes, mixed image sizes, mAP, resuming."""

import copy
import functools
import json
import re
import shlex

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops

import inference
from config import load_config
from engine import Precision
from models import adapt_size, build_model
from tests.helpers import DIGITS, save_network
from tests.nets import as_stored
from tests.processes import ROOT
from tools import export

pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install pycocotools")

from examples import detection  # noqa: E402
from examples.detection_data import CocoScenes, DigitScenes, draw_found, evaluate, in_coco_format, unzip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """The config of a network of a few thousand parameters."""
    path = tmp_path_factory.mktemp("cfg") / "tiny.yaml"
    path.write_text(f"BASE: [{DIGITS}]\nDATA: {{IMG_SIZE: 32}}\nMODEL: {{STRIP_MLP: {{PATCH_SIZE: 4, EMBED_DIM: 8, "
                    "DEPTHS: [1, 1, 1, 1]}}\n")
    return path


def test_scenes_are_the_same_each_time_and_boxes_hold_their_digits():
    scenes, again = DigitScenes("train", 20), DigitScenes("train", 20)
    sizes = set()
    for (image, target), (other, _) in zip(scenes, again, strict=True):
        assert torch.equal(image, other) and 0 <= image.min() and image.max() <= 1
        height, width = image.shape[1:]
        sizes.add((height, width))
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= width).all() and (y2 <= height).all()
        assert (x2 - x1 >= 18).all() and len(target["labels"]) == len(x1) >= 1
    assert len(sizes) > 10
    assert not torch.equal(DigitScenes("val", 1)[0][0][:, :90, :90], scenes[0][0][:, :90, :90])


def parse(config_file, *more):
    """The arguments of a detector of a few thousand parameters."""
    return detection.PARSER.parse_args(["--cfg", str(config_file), "--data-path", "digits", "--channels", "8",
                                        "--min-size", "64", "--max-size", "128", *map(str, more)])


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory):
    """A classification network and its checkpoint."""
    config = load_config(config_file)
    net = build_model(config)
    return net, save_network(tmp_path_factory.mktemp("trained") / "best.pth", config, net)


def test_retinanet_on_images_of_two_sizes(config_file, trained, tmp_path):
    """Losses and gradients reach the stem, from published weights of other classes, with MLP-DINO's keys."""
    net, _ = trained
    weights = tmp_path / "released.pth"
    torch.save({"model": as_stored(net.state_dict(), "proh_w")}, weights)
    detector = detection.build_detector(parse(config_file, "--pretrained", weights), num_classes=3).train()
    assert torch.equal(detector.backbone.net.stem.weight, net.stem.weight)
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 64)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([label])} for label in (0, 2)]
    sum(detector(images, targets).values()).backward()
    assert detector.backbone.net.stem.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("source", ["folder", "hf-hub:me/net"])
def test_weights_of_a_hub_folder(source, config_file, trained, tmp_path, monkeypatch):
    """Those of ``tools/export.py --format hub``, from the folder and from the Hub, which it is uploaded to."""
    net, weights = trained
    assert export.main([str(weights), str(tmp_path / "hub"), "--format", "hub"]) == 0
    monkeypatch.setattr(inference.huggingface_hub, "hf_hub_download", lambda repository, name, revision: {
        ("me/net", None): tmp_path / "hub" / name}[repository, revision])
    given = tmp_path / "hub" if source == "folder" else source
    detector = detection.build_detector(parse(config_file, "--pretrained", given), num_classes=3)
    own, expected = detector.backbone.net.state_dict(), net.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in own.items()) and len(own) > 100


def test_all_images_of_one_size(config_file, trained):
    """The weights are resized to it, and no windows are cut."""
    net, weights = trained
    args = parse(config_file, "--pretrained", weights, "--resize", 64)
    detector = detection.build_detector(args, num_classes=3).eval()
    backbone = detector.backbone.net
    expected = adapt_size(net.state_dict(), backbone)
    key = "stages.0.0.token_mixing.cgsmm.row_strip.weight"
    assert torch.equal(backbone.state_dict()[key], expected[key]) and expected[key].shape[1] == 16
    seen = []
    backbone.stem.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    detector([torch.rand(3, 64, 90), torch.rand(3, 70, 64)])
    assert seen == [(2, 3, 64, 64)]


def test_frozen_norms_stay_as_loaded(config_file):
    config = load_config(config_file)
    backbone = detection.Backbone(config, channels=8, freeze_norm=True).train()
    before = backbone.net.stages[0][0].token_mixing.conv_norm.running_mean.clone()
    backbone(torch.rand(2, 3, 64, 48))
    assert torch.equal(backbone.net.stages[0][0].token_mixing.conv_norm.running_mean, before)
    assert not backbone.net.stages[0][0].token_mixing.conv_norm.weight.requires_grad


class Oracle(torch.nn.Module):
    """Knows the boxes; gives every second one another label."""

    def __init__(self, dataset, errs):
        super().__init__()
        self.targets, self.errs = iter([target for _, target in dataset]), errs

    def forward(self, images):
        found = []
        for target in (next(self.targets) for _ in images):
            labels = (target["labels"] + self.errs * (torch.arange(len(target["labels"])) % 2)) % 10
            found.append({"boxes": target["boxes"].clone(), "labels": labels, "scores": torch.ones(len(labels))})
        return found


@pytest.mark.parametrize("errs, low, high", [(0, 100, 100), (1, 1, 80)])
def test_map_of_known_detections(errs, low, high):
    dataset = DigitScenes("val", 12)
    loader = torch.utils.data.DataLoader(dataset, 5, collate_fn=unzip)
    mean, half = evaluate(Oracle(dataset, errs), loader, Precision("fp32", CPU), CPU)
    assert low <= mean <= high + 1e-9 and half == pytest.approx(mean)  # every box is exact


def test_boxes_are_drawn_where_they_were_found():
    """Of two scenes with everything found, the picture differs from the scene along the boxes alone."""
    dataset = DigitScenes("val", 2)
    drawn, plain = (draw_found(Oracle(dataset, 0), dataset, CPU, threshold=threshold) for threshold in (0.5, 1.5))
    assert drawn.size == plain.size == (812, 408)
    change = ImageChops.difference(drawn, plain).convert("L").point(lambda value: 255 * (value > 2))  # beyond rounding
    assert 0.005 < sum(change.histogram()[1:]) / (change.width * change.height) < 0.2


def test_found_boxes_in_coco_s_format():
    output = {"boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0]]), "labels": torch.tensor([1]),
              "scores": torch.tensor([0.5])}
    assert in_coco_format(output, 4, categories=[3, 7]) == [
        {"image_id": 4, "category_id": 7, "bbox": [1, 2, 10, 20], "score": 0.5}]


def test_a_folder_in_coco_s_format(tmp_path):
    """Category ids with gaps, a crowd, an image without objects."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        for number in (1, 2):
            Image.new("RGB", (40, 30)).save(tmp_path / f"{split}2017" / f"{number}.png")
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in (1, 2)],
            "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "cat"}],
            "annotations": [
                {"id": 1, "image_id": 2, "category_id": 7, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
                {"id": 2, "image_id": 2, "category_id": 3, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1}],
        }
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    train, val = CocoScenes(tmp_path, "train"), CocoScenes(tmp_path, "val")
    assert (len(train), len(val)) == (1, 2) and val.classes == ["cat", "cup"]
    image, target = train[0]
    assert image.shape == (3, 30, 40) and target["image_id"] == 2
    assert target["boxes"].tolist() == [[1, 2, 11, 22]] and target["labels"].tolist() == [1]


def test_training_resumes(config_file, tmp_path, capsys):
    command = ["--cfg", str(config_file), "--data-path", "digits", "--output", str(tmp_path), "--channels", "8",
               "--scenes", "4", "--batch-size", "2", "--min-size", "64", "--max-size", "64", "--device", "cpu"]
    assert detection.main([*command, "--epochs", "2"]) == 0
    whole = torch.load(tmp_path / "last.pth", weights_only=True)
    assert whole["epoch"] == 2 and "epoch 2  loss" in capsys.readouterr().out
    assert Image.open(tmp_path / "found.jpg").size == (400, 400)
    assert detection.main([*command, "--epochs", "3"]) == 0
    log = capsys.readouterr().out
    assert "after epoch 2" in log and "epoch 3  loss" in log and "epoch 2  loss" not in log
    lines = torch.load(tmp_path / "last.pth", weights_only=True)["optimizer"]["param_groups"]
    factor = detection.learning_rate_factor(5, 6, 0)  # that of a run without a break in its last step
    assert [group["lr"] for group in lines] == pytest.approx([1e-4 * factor, 1e-5 * factor])


@pytest.mark.parametrize(("path", "value", "message"), [
    (("epoch",), None, "its epoch is None"), (("epoch",), 10**9, "its epoch is 1000000000"),
    (("model",), 3, "not a state dict"), (("model", "0.weight"), torch.full((3, 4), torch.nan), "not finite: 0.weight"),
    (("optimizer", "state", 0, "exp_avg"), torch.zeros(1), "parameter 0: exp_avg is (1,)"),
    (("optimizer",), [], "another one or has other parameter groups"), (("scaler",), 3, "its scaler is int"),
])
def test_an_odd_checkpoint_changes_nothing(path, value, message):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu", enabled=False)}
    content = copy.deepcopy({name: part.state_dict() for name, part in state.items()} | {"epoch": 2})
    assert detection.restore(content, state) == 2
    *above, last = path
    functools.reduce(dict.__getitem__, above, content)[last] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        detection.restore(content, state)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    with pytest.raises(ValueError, match="lacks scaler, epoch"):
        detection.restore({"model": {}, "optimizer": {}}, state)


def test_bad_input_is_one_line(config_file, capsys, tmp_path):
    assert detection.main(["--cfg", str(config_file), "--data-path", str(tmp_path)]) == 2
    assert "instances_train2017.json does not exist; --data-path takes 'digits' or a folder" in capsys.readouterr().err


@pytest.mark.parametrize("annotations, message", [
    ('{"images": [', "is not in COCO's format (JSONDecodeError"),
    ("[1]", "is not in COCO's format (AssertionError"),
    ('{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', "is not in COCO's format (KeyError"),
    ('{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}', "has no images"),
    ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
])
def test_annotations_that_cannot_be_used(tmp_path, annotations, message):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    file.write_text(annotations)
    with pytest.raises(ValueError, match="train2017 of the images does not exist"):
        CocoScenes(tmp_path, "train")
    (tmp_path / "train2017").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{file} {message}")):
        CocoScenes(tmp_path, "train")


# ---- docs/detection.md ---------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "detection.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE, re.S | re.M)
SMALL = "img_size=32, embed_dim=8, depths=(1, 1, 1, 1), dynamic_img_size=True"


def run_block(word, replaced=(), **names):
    """What the guide's only block with a word in it defines, with small networks."""
    block, = (block for block in BLOCKS if word in block)
    for there, here in (("dynamic_img_size=True", SMALL), *replaced):
        assert there in block
        block = block.replace(there, here)
    exec(block, names)
    return names


def test_guide_s_commands(config_file):
    """The options exist, and --help states the defaults that the guide compares with MLP-DINO's."""
    lines = GUIDE.replace("\\\n", " ").splitlines()
    commands = [line.partition("examples/detection.py ")[2] for line in lines if "examples/detection.py --" in line]
    assert len(commands) >= 2
    for command in commands:
        assert detection.PARSER.parse_args(shlex.split(command)).cfg.startswith("configs/")
    args = detection.PARSER.parse_args(["--cfg", "x", "--data-path", "digits"])
    assert (args.lr, args.backbone_lr, args.epochs, args.batch_size) == (1e-4, 1e-5, 12, 4)


def test_guide_s_feature_maps():
    names = run_block("features_only")
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 16, 60, 80), (1, 32, 30, 40), (1, 64, 15, 20)]


def test_guide_s_segmenter(capsys):
    pytest.importorskip("segmentation_models_pytorch")
    run_block("segmentation_models_pytorch")
    sizes = ((224, 224), (320, 320), (352, 512), (333, 500))
    assert capsys.readouterr().out.splitlines() == [str((1, 21, *size)) for size in sizes]


def test_guide_s_grad_cam(tmp_path):
    """The map is the mean gradient of each channel times the channel, summed, its positive part from 0 to 1."""
    pytest.importorskip("pytorch_grad_cam")
    path = tmp_path / "a.pth"
    torch.manual_seed(0)
    source = timm.create_model("strip_mlp_tiny", img_size=32, embed_dim=8, depths=(1, 1, 1, 1))
    torch.save({"model": source.state_dict()}, path)
    images = torch.randn(1, 3, 320, 480)
    replaced = (("strip_mlp_tiny.pth", str(path)), ("torch.randn(1, 3, 320, 480)", "images"))
    names = run_block("pytorch_grad_cam", replaced, images=images)
    net = names["net"]
    seen = net.forward_intermediates(images, indices=[3], intermediates_only=True)[0].detach().requires_grad_()
    net.forward_head(net.norm(seen)).max().backward()
    expected = (seen.grad.mean((2, 3), keepdim=True) * seen).sum(1, keepdim=True).relu()
    expected = F.interpolate(expected, (320, 480), mode="bilinear", align_corners=False)[0, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(torch.from_numpy(names["heat"][0]), expected, rtol=1e-3, atol=1e-3)
