"""The MLP baselines as timm's models: what is theirs by name, and the interface that they share."""

import copy

import pytest
import timm
import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from models import SMLPNet, count_batches_once, freeze_stages, load_pretrained, smlpnet, wavemlp
from tests.nets import equal

TINY = {
    "smlpnet_tiny": {"img_size": (32, 64), "embed_dim": 8, "depths": (1, 2, 1, 1)},
    "wave_mlp_small": {"embed_dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1)},
    "wave_mlp_base": {"embed_dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "mlp_ratios": (2, 2, 1, 1)},
}
DIMS = {"smlpnet_tiny": [8, 16, 32, 64], "wave_mlp_small": [8, 12, 16, 24], "wave_mlp_base": [8, 12, 16, 24]}
each = pytest.mark.parametrize("name", TINY)


def created(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **TINY[name] | {"num_classes": 5} | kwargs).double().eval()


def images(count=2):
    return torch.randn(count, 3, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stage_outputs(net, x):
    """What leaves each stage, from outside: the inputs of the next embedding and of the last norm."""
    found = []
    embeddings = net.to_patch_embedding[1:] if isinstance(net, SMLPNet) else net.network[1::2]
    after = [*embeddings, net.get_submodule(net.final_norm)]
    hooks = [module.register_forward_pre_hook(lambda module, args: found.append(args[0])) for module in after]
    net(x)
    for hook in hooks:
        hook.remove()
    return found


# ---- the variants --------------------------------------------------------------------------------

PARAMETERS = {  # at 224 with 1000 classes
    "smlpnet_tiny": 24_123_584, "smlpnet_small": 48_558_136, "smlpnet_base": 65_880_408, "wave_mlp_tiny": 17_193_160,
    "wave_mlp_small": 30_708_040, "wave_mlp_medium": 44_056_632, "wave_mlp_base": 63_586_360,
}


@pytest.mark.parametrize("name", [*smlpnet.VARIANTS, *wavemlp.VARIANTS])
def test_variants(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    cfg = net.default_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ((3, 224, 224), 0.875, "bicubic")
    assert net.get_submodule(cfg["classifier"]) is net.get_classifier()
    assert net.get_submodule(cfg["first_conv"]).weight.shape[1] == 3


@pytest.mark.parametrize("name", ["smlpnet_tiny", "wave_mlp_small"])
def test_drop_path_rises_linearly(name):
    def found(**kwargs):
        return [module.drop_prob for module in created(name, **kwargs).modules() if isinstance(module, DropPath)]

    ramp = [0, 0.1, 0.2, 0.3, 0.4]
    assert sorted(set(found())) == [0]
    expected = sorted(2 * ramp) if name == "smlpnet_tiny" else ramp  # one DropPath a branch, or one a block
    assert sorted(found(drop_path_rate=0.4)) == pytest.approx(expected)


def test_sizes():
    with pytest.raises(ValueError, match=r"img_size 72 is not .*the nearest valid sizes are 64 and 96"):
        SMLPNet(img_size=72)
    with pytest.raises(ValueError, match="built for images of 32x64, got a batch of shape .*resize the images"):
        created("smlpnet_tiny")(images().transpose(2, 3))
    assert created("wave_mlp_small")(images()[:, :, :23, :51]).shape == (2, 5)


# ---- timm's interface ----------------------------------------------------------------------------

@each
@pytest.mark.parametrize("indices, expected", [(None, [0, 1, 2, 3]), (1, [3]), ([0, 2], [0, 2]), ((-1, 0), [3, 0])])
def test_forward_intermediates(name, indices, expected):
    net, x = created(name), images()
    outputs, last = stage_outputs(net, x), net.forward_features(x)
    features, found = net.forward_intermediates(x, indices)
    assert torch.equal(features, last) and equal(found, [outputs[i] for i in expected])
    normed = net.forward_intermediates(x, indices, norm=True, intermediates_only=True)
    assert equal(normed, [last if i == 3 else outputs[i] for i in expected])
    features, found = net.forward_intermediates(x, indices, stop_early=True)
    assert torch.equal(features, last if max(expected) == 3 else outputs[max(expected)])
    assert equal(found, [outputs[i] for i in expected])
    with pytest.raises(ValueError, match="output_fmt 'NLC' is not 'NCHW'"):
        net.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        net.forward_intermediates(x, [4])


@each
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 2), (1,)])
def test_features_only(name, out_indices):
    """A detector's view: strides 4 to 32, the classifier's numbers, nothing left of what is not used."""
    backbone = created(name, features_only=True, out_indices=out_indices)
    outputs = stage_outputs(created(name), images())
    assert equal(backbone(images()), [outputs[i] for i in out_indices])
    assert backbone.feature_info.channels() == [DIMS[name][i] for i in out_indices]
    assert backbone.feature_info.reduction() == [4 * 2**i for i in out_indices]
    assert [f.shape[2:] for f in backbone(images())] == [(8 // 2**i, 16 // 2**i) for i in out_indices]
    sum(f.sum() for f in backbone(images())).backward()
    assert not [key for key, p in backbone.named_parameters() if p.grad is None]  # no parameter in vain


@each
@pytest.mark.parametrize("out_indices", [(0, 2), (0, 1, 2, 3)])
def test_features_only_loads_a_whole_network(name, out_indices, tmp_path):
    """As a detector starts from a classifier: what was pruned is left out, all else must fit."""
    net = created(name, num_classes=7)
    torch.save({"model": net.state_dict()}, tmp_path / "checkpoint.pth")
    backbone = timm.create_model(name, **TINY[name], features_only=True, out_indices=out_indices,
                                 checkpoint_path=tmp_path / "checkpoint.pth").double()
    expected = stage_outputs(net, images())
    found = backbone.eval()(images())
    for i, output in zip(out_indices, found, strict=True):
        torch.testing.assert_close(output, expected[i], rtol=1e-4, atol=1e-5)  # through 32 bits
    deeper = TINY[name] | {"depths": (1, 2, 2, 1)}
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(name, **deeper, features_only=True, checkpoint_path=tmp_path / "checkpoint.pth")


@each
def test_reset_classifier(name):
    net, x = created(name), images()
    features, before = net.forward_features(x), copy.deepcopy(net.state_dict())
    net.reset_classifier(7)
    head = net.get_classifier()
    assert (net.num_classes, head.weight.shape, head.weight.dtype) == (7, (7, DIMS[name][3]), torch.float64)
    pooled = features.mean((2, 3))
    assert torch.equal(net(x), F.linear(pooled, head.weight, head.bias))
    net.reset_classifier(0)
    assert torch.equal(net(x), pooled)
    net.reset_classifier(0, "")
    assert torch.equal(net(x), features)
    with pytest.raises(ValueError, match="global_pool 'max' must be 'avg', or ''"):
        net.reset_classifier(3, "max")
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in before if "head" not in key)


@each
def test_dropout_before_the_head(name):
    net = created(name, drop_rate=0.5).train()
    dropped = net.forward_head(torch.ones(64, DIMS[name][3], 1, 1, dtype=torch.float64), pre_logits=True)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


@each
@pytest.mark.parametrize("hooked", [False, True])
def test_gradient_checkpointing(name, hooked):
    """The same gradients and statistics, as main.py trains timm's models (``hooked``) and without."""

    def train(checkpointing):
        net = created(name, drop_path_rate=0.3).train()
        net.set_grad_checkpointing(checkpointing)
        if hooked:
            count_batches_once(net)
        torch.manual_seed(2)
        net(images(4)).square().sum().backward()
        return net.state_dict() | {f"{key} gradient": p.grad for key, p in net.named_parameters()}

    plain, checkpointed = train(False), train(True)
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-12, atol=1e-12, msg=key)


@each
def test_gradient_checkpointing_keeps_less(name):
    def kept(checkpointing):
        net, sizes = created(name).train(), []
        net.set_grad_checkpointing(checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            net(images())
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@each
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher(name, coarse):
    """Every parameter has its group, in the order of the network: the stem, blocks or stages, the head."""
    net = created(name)
    groups = group_parameters(net, net.group_matcher(coarse))
    assert sorted(groups) == list(range(6 if coarse else 7))  # stages 4, blocks 5, stem and head
    assert sorted(key for keys in groups.values() for key in keys) == sorted(key for key, _ in net.named_parameters())
    smlp = name == "smlpnet_tiny"
    assert all(key.startswith("to_patch_embedding.0." if smlp else "patch_embed.") for key in groups[0])
    assert [key for key in groups[max(groups)]] == [f"{net.classifier}.weight", f"{net.classifier}.bias"]
    second = ("to_patch_embedding.1.", "token_mix.1.", "channel_mix.1.") if smlp else ("network.1.", "network.2.0.")
    rest = () if not coarse else ("token_mix.2.", "channel_mix.2.") if smlp else ("network.2.1.",)
    assert {next(p for p in (*second, *rest) if key.startswith(p)) for key in groups[2]} == {*second, *rest}
    assert {key for key in groups[max(groups) - 1] if "norm." in key and key.count(".") == 1}


@each
def test_frozen_stages_get_no_gradient(name):
    net = created(name)
    freeze_stages(net, 2)
    frozen = {key for key, p in net.named_parameters() if not p.requires_grad}
    outputs = net.forward_intermediates(images(), intermediates_only=True)
    assert [output.requires_grad for output in outputs] == [False, False, True, True]
    net(images()).sum().backward()
    assert {key for key, p in net.named_parameters() if p.grad is None} == frozen


@each
def test_other_classes_keep_their_new_head(name):
    source, net = created(name), created(name, num_classes=3)
    head = net.get_classifier().weight.clone()
    skipped = load_pretrained(net, {"model": source.state_dict()})
    assert skipped == [f"{net.classifier}.weight", f"{net.classifier}.bias"]
    assert torch.equal(net.get_classifier().weight, head)
    assert torch.equal(net.forward_features(images()), source.forward_features(images()))
    assert isinstance(net.get_classifier(), nn.Linear)


# ---- what others do with them --------------------------------------------------------------------

@each
def test_hooks_and_symbolic_trace(name):
    """A hook on a stage, as Grad-CAM sets it, sees the stage's output; torch.fx traces the network."""
    net, x = created(name), images()
    parent, numbers = ("channel_mix", (0, 2, 3, 4)) if name == "smlpnet_tiny" else ("network", (0, 2, 4, 6))
    stages = [f"{parent}.{number}" for number in numbers]
    found = []
    for stage in stages:
        net.get_submodule(stage).register_forward_hook(lambda module, inputs, output: found.append(output))
    assert equal(net.forward_intermediates(x, intermediates_only=True), found)
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_lora_on_the_token_layers():
    peft = pytest.importorskip("peft")
    net, x = created("smlpnet_tiny"), images()
    expected = net(x)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["proj_h", "proh_w"])).double().eval()
    for key, parameter in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    changed = adapted(x)
    assert not torch.allclose(changed, expected, rtol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(x), changed)


@pytest.mark.parametrize("name", [*TINY, "strip_mlp_tiny"])
def test_features_only_in_fine_tuning(name):
    """Gradient checkpointing, layer decay and frozen stages by themselves, as with a whole network."""
    options = TINY.get(name) or {"img_size": (32, 64), "embed_dim": 8, "depths": (1, 2, 1, 1)}
    torch.manual_seed(0)
    backbone = timm.create_model(name, **options, features_only=True, out_indices=(0, 1, 2)).double().train()
    backbone.set_grad_checkpointing()
    assert backbone.model.grad_checkpointing
    optimizer = create_optimizer_v2(backbone, opt="sgd", lr=1.0, layer_decay=0.5, weight_decay=0.1)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    names = {id(p): key for key, p in backbone.named_parameters()}
    assert scales.keys() == names.keys()
    assert len(set(scales.values())) == 1 + 4  # the stem and four blocks
    stem = [scale for key, scale in scales.items() if names[key].startswith(("model.stem", "model.patch_embed",
                                                                            "model.to_patch_embedding.0"))]
    assert set(stem) == {min(scales.values())}
    freeze_stages(backbone, 2)
    assert [output.requires_grad for output in backbone(images())] == [False, False, True]
    with pytest.raises(ValueError, match="TRAIN.FREEZE_STAGES is 4; StageFeatures has 3 stages"):
        freeze_stages(backbone, 4)


@pytest.mark.parametrize("name", [*TINY, "strip_mlp_tiny"])
def test_an_output_stride_that_there_is_not(name):
    with pytest.raises(ValueError, match=f"{name}: output_stride 8 is not supported, .*; use 32, and a decoder"):
        timm.create_model(name, features_only=True, output_stride=8)
    timm.create_model(name, **TINY.get(name, {}), device="meta", features_only=True, output_stride=32)
