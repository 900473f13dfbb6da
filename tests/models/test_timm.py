"""What timm and its tools ask of a model, with the installed timm."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import group_parameters, load_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from yacs.config import CfgNode

from checkpoint import save_file
from models import StripMLPNet, adapt_size
from models.strip_mlp import VARIANTS
from tests.nets import SIZES, as_stored, equal, shapes, tiny_net


def created(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("strip_mlp_tiny", **SIZES | kwargs).eval()


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- create_model --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_create_model(name):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=7, in_chans=4, img_size=(64, 96), num_patches=1, drop_path_rate=0.25)
        default = timm.create_model(name)
    assert isinstance(net, StripMLPNet)
    rates = [block.drop_path.drop_prob for stage in net.stages for block in stage]
    assert rates == [0.25] * sum(VARIANTS[name]["depths"])
    dim = VARIANTS[name]["embed_dim"]
    row, column = (f"stages.0.0.token_mixing.cgsmm.{axis}_strip.weight" for axis in ("row", "column"))
    assert (shapes(net)[row], shapes(net)[column]) == ((dim // 2, 24, 24, 3), (dim // 2, 16, 16, 3))
    assert (shapes(net)["head.weight"], shapes(net)["stem.weight"]) == ((7, 8 * dim), (dim, 4, 4, 4))
    d = dim // 2 // VARIANTS[name]["num_patches"]
    assert (shapes(default)[row], shapes(default)["head.weight"]) == ((d, 56, 56, 3), (1000, 8 * dim))
    assert net(torch.zeros(2, 4, 64, 96, device="meta")).shape == (2, 7)
    assert (net.in_chans, net.num_classes) == (4, 7)
    assert default.default_cfg["input_size"] == (3, 224, 224)
    assert name in timm.list_models("strip_mlp*")


def test_arguments_of_timm_train():
    """What timm's train.py and validate.py pass to any model."""
    net = timm.create_model("strip_mlp_tiny", pretrained=False, in_chans=3, drop_rate=0.5,
                            drop_path_rate=None, drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None,
                            scriptable=False, checkpoint_path="", **SIZES)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for strip_mlp_tiny"):
        created(pretrained=True)
    features = torch.ones(64, 64, 1, 1)
    assert torch.equal(net.eval().forward_head(features, pre_logits=True), features[:, :, 0, 0])
    torch.manual_seed(0)
    dropped = net.train().forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}  # half of them dropped, the others doubled
    assert 0.45 < float((dropped == 0).float().mean()) < 0.55


def test_device_and_dtype():
    """As timm's own networks take them."""
    for kwargs in ({}, {"features_only": True}):
        parameter = next(created(device="meta", dtype=torch.float16, **kwargs).parameters())
        assert (parameter.device.type, parameter.dtype) == ("meta", torch.float16)


# ---- the head ------------------------------------------------------------------------------------

def test_reset_classifier():
    net = tiny_net().double().eval()
    before, old_head = copy.deepcopy(net.state_dict()), net.get_classifier()
    torch.manual_seed(1)
    net.reset_classifier(7)
    head = net.get_classifier()
    assert head is net.head
    assert head is not old_head
    assert (net.num_classes, head.weight.shape, head.weight.dtype) == (7, (7, 64), torch.float64)
    x = images().double()
    assert net(x).shape == (2, 7)
    features = net.forward_features(x)
    net.reset_classifier(0)
    assert torch.equal(net(x), features.mean((2, 3)))
    net.reset_classifier(0, "")
    assert torch.equal(net(x), features)
    net.reset_classifier(3)
    assert net(x).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool 'max' must be 'avg', or ''"):
        net.reset_classifier(3, "max")
    assert net.num_features == net.head_hidden_size == 64
    kept = [key for key in before if not key.startswith("head")]
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in kept)
    assert tiny_net(num_classes=0)(images()).shape == (2, 64)
    assert created(num_classes=0, global_pool="")(images()).shape == (2, 64, 1, 1)


# ---- features ------------------------------------------------------------------------------------

def stage_outputs(net, x):
    found = []
    hooks = [stage[-1].register_forward_hook(lambda module, args, output: found.append(output)) for stage in net.stages]
    net(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("indices, expected", [
    (None, [0, 1, 2, 3]), (1, [3]), (2, [2, 3]), ([0, 2], [0, 2]), ((-1, 0), [3, 0]), ([1], [1]), ([-3], [1]),
])
def test_forward_intermediates(indices, expected):
    net, x = tiny_net().eval(), images()
    outputs, last = stage_outputs(net, x), net.forward_features(x)
    features, found = net.forward_intermediates(x, indices)
    assert torch.equal(features, last)
    assert equal(found, [outputs[i] for i in expected])
    assert equal(net.forward_intermediates(x, indices, intermediates_only=True), found)
    normed = net.forward_intermediates(x, indices, norm=True, intermediates_only=True)
    assert equal(normed, [last if i == 3 else outputs[i] for i in expected])
    ran = []
    for i, stage in enumerate(net.stages):
        stage[0].register_forward_hook(lambda *args, i=i: ran.append(i))
    features, found = net.forward_intermediates(x, indices, stop_early=True)
    assert ran == list(range(max(expected) + 1))  # no stage in vain
    assert equal(found, [outputs[i] for i in expected])
    assert torch.equal(features, last if max(expected) == 3 else outputs[max(expected)])


@pytest.mark.parametrize("indices", [[4], [-5], 5, 0])
def test_stages_that_there_are_not(indices):
    for call in (lambda net: net.forward_intermediates(images(), indices),
                 lambda net: net.prune_intermediate_layers(indices)):
        with pytest.raises(AssertionError, match="out of range"):
            call(tiny_net())


def test_other_output_formats_are_refused():
    with pytest.raises(ValueError, match="output_fmt 'NLC' is not 'NCHW'"):
        tiny_net().forward_intermediates(images(), output_fmt="NLC")


@pytest.mark.parametrize("last, kept", [
    (0, {"stem", "stages"}), (1, {"stem", "stages", "merging"}), (2, {"stem", "stages", "merging", "shortcut_m1"}),
    (3, {"stem", "stages", "merging", "shortcut_m1", "shortcut_s", "shortcut_m2"}),
])
def test_prune_intermediate_layers(last, kept):
    net, x = tiny_net().eval(), images()
    outputs = stage_outputs(net, x)
    assert net.prune_intermediate_layers([0, last - 4], prune_norm=True) == [0, last]
    assert {key.split(".")[0] for key in net.state_dict()} == kept
    assert len(net.stages) == last + 1
    assert equal(net.forward_intermediates(x, [0, last], intermediates_only=True), [outputs[0], outputs[last]])
    assert torch.equal(net(x), outputs[last])
    net.reset_classifier(4, "avg")
    assert net.head.weight.shape == (4, 8 * 2**last)
    assert net(x).shape == (2, 4)


def test_pruning_nothing_but_the_head():
    net = tiny_net().eval()
    before = net.forward_features(images())
    assert net.prune_intermediate_layers(4) == [0, 1, 2, 3]
    assert torch.equal(net(images()), before)
    net = tiny_net()
    net.prune_intermediate_layers(1, prune_head=False)
    assert isinstance(net.head, nn.Linear)


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0,), (-2,), 2])
@pytest.mark.parametrize("height, width", [(32, 32), (64, 96)])
def test_features_only(height, width, out_indices):
    """A detector's view: strides 4 to 32, their channels, the same numbers as the classifier has inside."""
    wanted = [2, 3] if out_indices == 2 else [i % 4 for i in out_indices]
    backbone = created(img_size=(height, width), features_only=True, out_indices=out_indices)
    net, x = created(img_size=(height, width)), images(height, width)
    outputs = stage_outputs(net, x)
    features = backbone(x)
    assert equal(features, [outputs[i] for i in wanted])
    strides = [4 * 2**i for i in wanted]
    assert backbone.feature_info.reduction() == strides
    assert backbone.feature_info.channels() == [8 * 2**i for i in wanted]
    assert [f.shape for f in features] == [(2, 2 * s, height // s, width // s) for s in strides]
    last = max(wanted)
    assert not [key for key in backbone.state_dict() if key.startswith(("model.head", "model.norm"))]
    assert len(backbone.model.stages) == last + 1


def test_features_only_by_default_gives_all_four_stages():
    assert [f.shape[1] for f in created(features_only=True)(images())] == [8, 16, 32, 64]


@pytest.mark.parametrize("feature_cls", ["hook", "getter"])
def test_feature_classes(feature_cls):
    net = created()
    found = created(features_only=True, feature_cls=feature_cls)(images())
    assert equal(found, stage_outputs(net, images()))


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def source():
    """A network whose statistics are not a new one's."""
    net = tiny_net(seed=9)
    with torch.no_grad():
        net.train()(images())
    return net.eval()


@pytest.fixture(params=["own", "own with an average", "proj_w", "proh_w", "bare"])
def path(request, source, tmp_path):
    """A checkpoint of ``source``."""
    weights, path = source.state_dict(), tmp_path / "checkpoint.pth"
    if request.param in ("proj_w", "proh_w"):
        torch.save({"model": as_stored(weights, request.param), "epoch": 299, "config": CfgNode({"SEED": 0})}, path)
    elif request.param == "bare":
        torch.save(weights, path)
    else:
        has_average = request.param != "own"
        other = {key: torch.zeros_like(value) for key, value in weights.items()} if has_average else weights
        save_file({"model": other, "model_ema": weights if has_average else None, "optimizer": {}, "epoch": 3}, path)
    return path


def same_weights(net, weights):
    own = net.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[key], value) for key, value in weights.items())


def test_checkpoint_path(source, path):
    """As timm's train.py (``--initial-checkpoint``) and validate.py load it: the average, where there is one."""
    assert same_weights(created(checkpoint_path=path), source.state_dict())
    net = created()
    load_checkpoint(net, str(path))
    assert torch.equal(net(images()), source(images()))


def test_checkpoint_path_at_another_size(source, path):
    net = created(img_size=(32, 96), checkpoint_path=path)
    assert same_weights(net, adapt_size(source.state_dict(), net))


@pytest.mark.parametrize("out_indices", [(0, 2), (0, 1, 2, 3)])
def test_checkpoint_path_with_features_only(source, path, out_indices):
    backbone = created(features_only=True, out_indices=out_indices, checkpoint_path=path)
    outputs = stage_outputs(source, images())
    assert equal(backbone(images()), [outputs[i] for i in out_indices])
    other = created(features_only=True, out_indices=out_indices)
    other.load_state_dict(backbone.state_dict())  # its own weights load as ever
    assert equal(other(images()), backbone(images()))


def test_features_of_a_deeper_network_are_refused(path):
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"stages\.2\.1"):
        created(features_only=True, depths=(1, 1, 1, 1), checkpoint_path=path)
    with pytest.raises(RuntimeError, match=r"Missing key.* \"stages\.1\.1"):
        created(features_only=True, depths=(1, 2, 2, 1), checkpoint_path=path)


def test_a_file_as_timm_s_pretrained_weights(source, path):
    """timm's way to fine-tune a local file: another class count, other input channels, another size."""
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 5}}
    assert same_weights(created(**options), source.state_dict())
    net = created(**options | {"num_classes": 3, "in_chans": 1, "img_size": 64})
    own = net.state_dict()
    expected = adapt_size(source.state_dict(), net)
    assert all(torch.equal(own[key], expected[key]) for key in own if not key.startswith(("stem", "head")))
    torch.testing.assert_close(own["stem.weight"], source.stem.weight.detach().sum(1, keepdim=True))
    assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 3)


# ---- the flow of timm's scripts ------------------------------------------------------------------

def test_validation_flow():
    """validate.py: data config from the model, transform from it, network on the picture."""
    net = created(img_size=64)
    settings = resolve_data_config({"img_size": 64}, model=net)
    assert (settings["interpolation"], settings["crop_pct"]) == ("bicubic", 224 / 256)
    image = create_transform(**settings)(Image.new("RGB", (100, 80), (255, 0, 0)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.tensor([1.0, 0, 0]) - mean) / std)[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(image, expected)
    assert net(image[None]).shape == (1, 5)


def test_layer_decay_groups():
    """timm's layer-wise learning-rate decay: 0.5 a block from the head to the stem, biases of strips without decay."""
    net = tiny_net()
    layer, parameters = groups(net, coarse=False), {id(p): key for key, p in net.named_parameters()}
    no_decay = net.no_weight_decay()
    found = param_groups_layer_decay(net, weight_decay=0.05, no_weight_decay_list=no_decay, layer_decay=0.5)
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    for param_groups in (found, optimizer.param_groups):
        seen = {}
        for group in param_groups:
            for p in group["params"]:
                seen[parameters[id(p)]] = (group["lr_scale"], group["weight_decay"])
        assert seen.keys() == set(parameters.values())
        for key, (scale, decay) in seen.items():
            assert scale == 0.5 ** (6 - layer[key]), key
            is_exempt = key.endswith("bias") or net.get_parameter(key).ndim == 1
            assert decay == (0.0 if is_exempt else 0.05), key


def test_timm_s_training_step():
    """An optimiser of timm's, its smallest step, and a loss that falls on one batch."""
    net = created(drop_path_rate=0.0).train()
    optimizer = create_optimizer_v2(net, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
    x, targets, losses = images(), torch.tensor([1, 3]), []
    for _ in range(4):
        loss = F.cross_entropy(net(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", ["classifier", pytest.param("features", marks=pytest.mark.slow)])
def test_compiled_without_a_graph_break(kind):
    sizes = {"img_size": (32, 64), "depths": (1, 1, 1, 1)}
    net = created(**sizes, **({"features_only": True} if kind == "features" else {}))
    torch._dynamo.reset()
    found = torch.compile(net, backend="eager", fullgraph=True)(images(32, 64))
    expected = net(images(32, 64))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# ---- groups --------------------------------------------------------------------------------------

def groups(net, coarse):
    """The parameters' names with their group's number."""
    return group_parameters(net, net.group_matcher(coarse=coarse), reverse=True)


@pytest.mark.parametrize("coarse, starts", [
    (False, [["stem"], ["stages.0.0"], ["stages.1.0", "merging.0"], ["stages.2.0", "merging.1", "shortcut_m1"],
             ["stages.2.1"], ["stages.3.0", "merging.2", "shortcut_s", "shortcut_m2", "norm"], ["head"]]),
    (True, [["stem"], ["stages.0"], ["stages.1", "merging.0"], ["stages.2", "merging.1", "shortcut_m1"],
            ["stages.3", "merging.2", "shortcut_s", "shortcut_m2", "norm"], ["head"]]),
])
def test_group_matcher(coarse, starts):
    """From the input to the output, nothing left over."""
    net = tiny_net()
    expected = {
        key: next(i for i, prefixes in enumerate(starts) if key.startswith(tuple(p + "." for p in prefixes)))
        for key, _ in net.named_parameters()
    }
    assert groups(net, coarse) == expected
    assert set(expected.values()) == set(range(len(starts)))


def test_no_weight_decay():
    net = tiny_net()
    biases = {key for key, p in net.named_parameters() if key.endswith("bias") and p.ndim > 1}
    assert len(biases) == 10
    assert net.no_weight_decay() == biases
