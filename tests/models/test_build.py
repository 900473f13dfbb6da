"""From the config to the network: each key arrives."""

import re

import pytest
import timm
import torch
from timm.layers import DropPath

from config import load_config
from models import StripMLPNet, build_model, count_batches_once
from tests.nets import shapes

TINY = ["DATA.IMG_SIZE", 32, "MODEL.NUM_CLASSES", 5, "MODEL.STRIP_MLP.EMBED_DIM", 8,
        "MODEL.STRIP_MLP.DEPTHS", [1, 1, 2, 1]]


def build(*opts):
    with torch.device("meta"):
        return build_model(load_config("", [*TINY, *opts]))


STRIP = "stages.0.0.token_mixing.cgsmm.row_strip.weight"


@pytest.mark.parametrize("key, value, parameter, before, after", [
    ("MODEL.STRIP_MLP.PATCH_SIZE", 2, "stem.weight", (8, 3, 4, 4), (8, 3, 2, 2)),
    ("MODEL.STRIP_MLP.PATCH_SIZE", 2, STRIP, (2, 8, 8, 3), (2, 16, 16, 3)),
    ("MODEL.STRIP_MLP.IN_CHANS", 1, "stem.weight", (8, 3, 4, 4), (8, 1, 4, 4)),
    ("MODEL.STRIP_MLP.EMBED_DIM", 16, "stem.weight", (8, 3, 4, 4), (16, 3, 4, 4)),
    ("MODEL.STRIP_MLP.MLP_RATIO", 2.5, "stages.0.0.channel_mixing.fc1.weight", (24, 8), (20, 8)),
    ("MODEL.STRIP_MLP.NUM_PATCHES", 4, STRIP, (2, 8, 8, 3), (1, 8, 8, 3)),
    ("MODEL.STRIP_MLP.STRIP_WIDTH", 5, STRIP, (2, 8, 8, 3), (2, 8, 8, 5)),
    ("DATA.IMG_SIZE", 64, STRIP, (2, 8, 8, 3), (2, 16, 16, 3)),
    ("MODEL.NUM_CLASSES", 7, "head.bias", (5,), (7,)),
])
def test_keys_change_shapes(key, value, parameter, before, after):
    assert shapes(build())[parameter] == before
    assert shapes(build(key, value))[parameter] == after


def test_depths():
    assert [len(stage) for stage in build("MODEL.STRIP_MLP.DEPTHS", "[2, 1, 3, 1]").stages] == [2, 1, 3, 1]


@pytest.mark.parametrize("schedule, expected", [("constant", [0.2] * 5), ("linear", [0, 0.05, 0.1, 0.15, 0.2])])
def test_drop_path(schedule, expected):
    model = build("MODEL.DROP_PATH_RATE", 0.2, "MODEL.DROP_PATH_SCHEDULE", schedule)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_gradient_checkpointing():
    assert build().grad_checkpointing is False
    assert build("TRAIN.USE_CHECKPOINT", True).grad_checkpointing is True
    timm_model = build("TRAIN.USE_CHECKPOINT", True, "MODEL.TYPE", "timm", "MODEL.ARCH", "resnet18")
    assert timm_model.grad_checkpointing is True


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="img_size 36 is not a multiple of 32 .*the nearest valid sizes are 32 and 64"):
        build("DATA.IMG_SIZE", 36)
    with pytest.raises(ValueError, match="embed_dim 10 is not a multiple of 2 x num_patches"):
        build("MODEL.STRIP_MLP.EMBED_DIM", 10)


# ---- timm's models -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, parameters, rate", [  # parameters of the published network, less its head
    ("resnet18", 11_689_512 - 513 * 1000, 0.1),
    ("swin_tiny_patch4_window7_224", 28_288_354 - 769 * 1000, 0.1),
])
def test_timm_models(name, parameters, rate):
    model = build("MODEL.TYPE", "timm", "MODEL.ARCH", name, "MODEL.NUM_CLASSES", 10, "DATA.IMG_SIZE", 224)
    features = model.get_classifier().in_features
    assert sum(p.numel() for p in model.parameters()) == parameters + (features + 1) * 10
    assert model(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, 10)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(rate)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "smlpnet_small"])
def test_no_drop_path_where_a_timm_model_has_some_by_default(name):
    opts = ["MODEL.TYPE", "timm", "MODEL.ARCH", name, "MODEL.DROP_PATH_RATE"]

    def highest(rate):
        return max((m.drop_prob for m in build(*opts, rate).modules() if isinstance(m, DropPath)), default=0.0)

    assert (highest(0), highest(0.15)) == (0.0, pytest.approx(0.15))


def test_timm_model_of_a_fixed_size_is_built_for_the_config_s():
    model = build("MODEL.TYPE", "timm", "MODEL.ARCH", "swin_tiny_patch4_window7_224", "DATA.IMG_SIZE", 256)
    assert model(torch.zeros(1, 3, 256, 256, device="meta")).shape == (1, 5)
    assert model.patch_embed.img_size == (256, 256)


def test_strip_mlp_by_its_timm_name_is_the_same_network():
    ours = build("MODEL.STRIP_MLP.EMBED_DIM", 80, "MODEL.STRIP_MLP.DEPTHS", [2, 2, 6, 2])
    by_name = build("MODEL.TYPE", "timm", "MODEL.ARCH", "strip_mlp_tiny_light")
    assert isinstance(by_name, StripMLPNet)
    assert shapes(ours) == shapes(by_name)


@pytest.mark.parametrize("name, suggestion", [
    ("resnt50", "resnet50"), ("swin_tny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
    ("strip_mlp_tinylight", "strip_mlp_tiny_light"), ("smlp_tiny_alpha3", "strip_mlp_tiny"), ("x", "none"),
])
def test_unknown_timm_name(name, suggestion):
    with pytest.raises(ValueError, match=f"^MODEL.ARCH '{name}' is not a timm model; similar ones: ") as error:
        build("MODEL.TYPE", "timm", "MODEL.ARCH", name)
    similar = str(error.value).partition("similar ones: ")[2].split(", ")
    assert suggestion in similar
    assert similar == ["none"] or all(timm.is_model(other) for other in similar)


def test_timm_model_without_drop_path():
    opts = ["MODEL.TYPE", "timm", "MODEL.ARCH", "vgg11"]
    with pytest.raises(ValueError, match=re.escape("MODEL.ARCH vgg11: ") + ".*drop_path.*MODEL.DROP_PATH_RATE 0"):
        build(*opts)
    assert build(*opts, "MODEL.DROP_PATH_RATE", 0).get_classifier().out_features == 5


def test_timm_kwargs():
    opts = ["MODEL.TYPE", "timm", "MODEL.ARCH", "resnet18", "MODEL.TIMM_KWARGS"]
    parameters = shapes(build(*opts, "{channels: [8, 16, 32, 64], stem_type: deep, stem_width: 4}"))
    assert parameters["conv1.0.weight"] == (4, 3, 3, 3) and parameters["fc.weight"] == (5, 64)
    with pytest.raises(ValueError, match="MODEL.ARCH resnet18: .*'chanels'"):
        build(*opts, "{chanels: [8, 16, 32, 64]}")
    for text in ("channels", "[1, 2]", "{channels", "{1: 2}"):
        with pytest.raises(ValueError, match=re.escape(f"MODEL.TIMM_KWARGS is '{text}'; it must name arguments")):
            build(*opts, text)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="older versions count a batch twice; compile_network does not compile there"))])
def test_timm_checkpointing_counts_a_batch_once(backend):
    """Without ``count_batches_once`` timm's recomputation moves the running statistics a second time."""

    def train(checkpointing, once):
        torch.manual_seed(0)
        model = build_model(load_config("", [
            *TINY, "MODEL.TYPE", "timm", "MODEL.ARCH", "resnet18", "TRAIN.USE_CHECKPOINT", checkpointing,
            "MODEL.TIMM_KWARGS", "{channels: [8, 16, 16, 16], layers: [1, 1, 1, 1], stem_type: deep, stem_width: 4}",
        ]))
        if once:
            count_batches_once(model)
        if backend:
            model.compile(backend=backend)
        for _ in range(2):
            model(images).square().sum().backward()
        gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters()}
        return model.state_dict() | gradients

    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain, once = train(False, False), train(True, True)
    assert plain.keys() == once.keys()
    for key, value in plain.items():
        torch.testing.assert_close(once[key], value, rtol=1e-5, atol=1e-5, msg=key)
    if not backend:
        twice = train(True, False)
        assert int(twice["layer1.0.bn1.num_batches_tracked"]) == 4 and int(plain["bn1.num_batches_tracked"]) == 2


def test_timm_model_without_checkpointing():
    opts = ["MODEL.TYPE", "timm", "MODEL.ARCH", "vgg11", "MODEL.DROP_PATH_RATE", 0, "TRAIN.USE_CHECKPOINT", True]
    with pytest.raises(ValueError, match="MODEL.ARCH vgg11: .*checkpointing.*; set TRAIN.USE_CHECKPOINT False"):
        build(*opts)
