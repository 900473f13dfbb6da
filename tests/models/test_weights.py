"""State dicts of either kind, loaded in part or strictly."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F

from models import (
    adapt_size,
    average_state_dict,
    convert_released_state_dict,
    load_pretrained,
    load_strict,
    model_state_dict,
    to_released_state_dict,
)
from tests.models.test_strip_layer import strip
from tests.nets import as_stored, tiny_net

LAYOUTS = ("own", "proj_w", "proh_w")


def tiny_model(seed, num_classes=5, **kwargs):
    model = tiny_net(seed, num_classes=num_classes, **kwargs)
    for key, buffer in model.named_buffers():  # statistics other than those of a new network
        buffer.copy_(torch.full_like(buffer, 7 + seed) if "batches" in key else torch.rand_like(buffer) + 0.5)
    return model


def copies(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- finding the weights in a checkpoint ---------------------------------------------------------

@pytest.mark.parametrize("prefix", [
    "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.",
])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nested", [False, True])
def test_model_state_dict(prefix, layout, nested):
    weights = copies(tiny_model(0))
    stored = {prefix + key: value for key, value in as_stored(weights, layout).items()}
    checkpoint = {"model": stored, "epoch": 3, "max_accuracy": 1.5, "optimizer": {}} if nested else stored
    found = model_state_dict(checkpoint)
    assert same(found, weights)
    assert list(found) == list(weights)


def test_prefixes_are_stripped_at_the_beginning_only():
    stored = {"module.a.module.weight": torch.ones(1), "module.modules.c": torch.ones(1)}
    assert list(model_state_dict(stored)) == ["a.module.weight", "modules.c"]


def other_trainers(weights, average) -> dict[str, dict]:
    """How other trainers store a network's weights, and an average of them."""
    def under(prefix, weights=weights):
        return {prefix + key: value for key, value in weights.items()}

    counters = {"stages.0.0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    return {
        "timm": {"state_dict": weights, "state_dict_ema": average, "epoch": 3, "args": object()},
        "torchvision": {"model": weights, "model_ema": under("module.", average) | {"n_averaged": torch.tensor(3)}},
        "Lightning": {"state_dict": under("model.") | {"criterion.weight": torch.ones(3)}, "hyper_parameters": {}},
        "Lightning, any name": {"state_dict": under("classifier.")},
        "mmpretrain": {"state_dict": under("backbone."), "meta": {}},
        "timm in mmpretrain": {"state_dict": under("backbone.timm_model.")},
        "DDP in torch.compile": {"model": under("_orig_mod.module.")},
        "nested": {"model": {"state_dict": weights}},
        "thop": weights | counters,
        "an average alone": {"model_ema": weights},
        "a state dict with other things": weights | {"_metadata": object()},
    }


@pytest.mark.parametrize("name", other_trainers({}, {}))
def test_checkpoints_of_other_trainers(name):
    weights, average = copies(tiny_model(0)), copies(tiny_model(1))
    stored = other_trainers(weights, average)[name]
    assert same(model_state_dict(stored), weights)
    found = average_state_dict(stored)
    assert same(found, average) if name in ("timm", "torchvision") else found is None


def test_a_backbone_without_a_head_starts_a_training():
    source, target = tiny_model(1), tiny_model(2)
    weights, before = copies(source), copies(target)
    stored = {f"backbone.{key}": value for key, value in weights.items() if not key.startswith("head.")}
    assert load_pretrained(target, {"state_dict": stored}) == ["head.weight", "head.bias"]
    assert same(copies(target), weights | {key: before[key] for key in ("head.weight", "head.bias")})


@pytest.mark.parametrize("checkpoint, named", [
    ({}, "none"), ({"model": {}}, "model"), ({"module": {"a": torch.ones(1)}, "epoch": 3}, "module, epoch"),
    ({"model": {"a": "b"}}, "model"), ({"epoch": 3}, "epoch"),
])
def test_no_weights(checkpoint, named):
    with pytest.raises(ValueError, match=f"no weights under model, state_dict, .*; the entries are: {named}$"):
        model_state_dict(checkpoint)


def test_a_pickled_network_is_named():
    with pytest.raises(ValueError, match="not a state dict but a whole pickled network"):
        model_state_dict({"model": object()})


def test_released_layout_of_the_strip_weights():
    """(D*L, L, 1, K) and (D*L) in the released files, (D, L, L, K) and (D, L) here: the same numbers in order."""
    ours = "stages.1.0.token_mixing.cgsmm.column_strip."
    theirs = "blocks2.0.token_mixing.smlp_block.proj_w."
    weight, bias = torch.arange(4 * 3 * 3 * 5).float(), torch.arange(4 * 3).float()
    released = {theirs + "weight": weight.view(12, 3, 1, 5), theirs + "bias": bias}
    converted = convert_released_state_dict(released)
    assert same(converted, {ours + "weight": weight.view(4, 3, 3, 5), ours + "bias": bias.view(4, 3)})
    assert same(to_released_state_dict(converted), released)


# ---- strict loading ------------------------------------------------------------------------------

def test_load_strict():
    source, target = tiny_model(1), tiny_model(2)
    assert not same(copies(source), copies(target))
    load_strict(target, copies(source))
    assert same(copies(source), copies(target))


@pytest.mark.parametrize("load", [load_strict, lambda model, weights: load_pretrained(model, {"model": weights})])
def test_every_mismatch_is_listed_and_nothing_loaded(load):
    source, target = tiny_model(1), tiny_model(2)
    before = copies(target)
    weights = copies(source)
    del weights["stem.weight"], weights["stages.2.1.channel_mixing.grn.gamma"]
    weights["extra.weight"] = torch.zeros(3)
    weights["stages.0.0.token_mixing.cgsmm.row_strip.bias"] = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="the weights do not fit the model in 4 places") as error:
        load(target, weights)
    assert str(error.value).splitlines()[1:] == [
        "  missing: stem.weight (8, 3, 4, 4)",
        "  missing: stages.2.1.channel_mixing.grn.gamma (1, 1, 1, 96)",
        "  unexpected: extra.weight",
        "  shape: stages.0.0.token_mixing.cgsmm.row_strip.bias is (2, 4) in the file, (2, 8) in the model",
    ]
    assert same(copies(target), before)


def test_released_file_with_missing_keys():
    released = to_released_state_dict(copies(tiny_model(1)))
    key = "blocks1.0.token_mixing.smlp_block.proj_h.weight"
    del released[key]
    with pytest.raises(ValueError, match=r"missing: stages\.0\.0\.token_mixing\.cgsmm\.row_strip\.weight"):
        load_pretrained(tiny_model(2), released)


def test_another_depth_or_p_is_refused_by_key():
    for kwargs, key in [
        ({"depths": (1, 1, 1, 1)}, "unexpected: stages.2.1.token_mixing.conv_norm.weight"),
        ({"num_patches": 4}, "cgsmm.row_strip.weight is (2, 8, 8, 3) in the file, (1, 8, 8, 3) in the model"),
    ]:
        with pytest.raises(ValueError) as error:
            load_pretrained(tiny_model(2, **kwargs), copies(tiny_model(1)))
        assert key in str(error.value)


# ---- another input size --------------------------------------------------------------------------

CGSMM = "stages.0.0.token_mixing.cgsmm."


def resize(x, length):
    """Linear resizing of the last axis, antialiased."""
    size = (x.shape[-2], length)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


def test_the_same_size_is_left_as_it_is(caplog):
    for size in (32, (32, 64)):
        weights = copies(tiny_model(1, img_size=size))
        adapted = adapt_size(weights, tiny_model(2, img_size=size))
        assert list(adapted) == list(weights)
        assert all(adapted[key] is value for key, value in weights.items())
    assert not caplog.records


@pytest.mark.parametrize("old, new", [(32, 64), (64, 32), (64, 96), ((64, 32), (32, 96)), (96, (64, 160))])
def test_adapted_strip_layers(old, new):
    """They do on the new map what the old ones do on its tokens resized to the old length and back."""
    source, target = tiny_model(1, img_size=old).double(), tiny_model(2, img_size=new).double()
    weights = copies(source)
    adapted = adapt_size(weights, target)
    assert {key: value.shape for key, value in adapted.items()} == {k: v.shape for k, v in target.state_dict().items()}
    height, width = (side // 4 for side in target.img_size)
    for axis, length in (("row", width), ("column", height)):
        x = torch.randn(2, 4, 3, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weight, bias = (f"{CGSMM}{axis}_strip.{name}" for name in ("weight", "bias"))
        expected = strip(resize(x, weights[bias].shape[1]), weights[weight], weights[bias], "row")
        found = strip(x, adapted[weight], adapted[bias], "row")
        torch.testing.assert_close(found, resize(expected, length), rtol=1e-12, atol=1e-12)
    sized = ("_strip.weight", "_strip.bias", "_position.table")
    assert all(adapted[key] is value for key, value in weights.items() if not key.endswith(sized))


def test_adapted_strip_layers_by_hand():
    """From 1 token to 2 and from 2 to 1: the sum over a strip keeps its scale."""
    one, two = tiny_model(1, img_size=32), tiny_model(2, img_size=64)
    weight, bias = (f"stages.3.0.token_mixing.cgsmm.row_strip.{name}" for name in ("weight", "bias"))
    up, down = adapt_size(copies(one), two), adapt_size(copies(two), one)
    torch.testing.assert_close(up[weight], one.state_dict()[weight].expand(-1, 2, 2, -1) / 2)
    torch.testing.assert_close(up[bias], one.state_dict()[bias].expand(-1, 2))
    torch.testing.assert_close(down[weight], two.state_dict()[weight].mean(1, keepdim=True).sum(2, keepdim=True))
    torch.testing.assert_close(down[bias], two.state_dict()[bias].mean(1, keepdim=True))


@pytest.mark.parametrize("old, new, source_offsets", [
    # of each new entry, counted in old tokens; beyond the outermost offset that is read, that one's entry
    (64, 128, [-1, -1, -1, -0.5, 0, 0.5, 1, 1, 1]),
    (128, 64, [-3, -2, 0, 2, 3]),
    ((64, 128), (128, 64), [-1, -1, -1, -0.5, 0, 2, 3]),
])
def test_adapted_position_tables(old, new, source_offsets):
    """A table that is linear in the offset, in the last stage: 2 tokens a side for 64 pixels, 4 for 128."""
    key = "stages.3.0.token_mixing.cgsmm.column_position.table"
    source, target = tiny_model(1, img_size=old), tiny_model(2, img_size=new)
    weights = copies(source)
    height = source.img_size[0] // 32
    offsets = torch.arange(len(weights[key])) - float(height)
    slopes = torch.tensor([1.0, -2.0] * 16)
    weights[key] = offsets[:, None] * slopes + 3
    weights[key][[0, -1]] = 100.0  # the two that are never read
    adapted = adapt_size(weights, target)[key]
    torch.testing.assert_close(adapted, torch.tensor(source_offsets).float()[:, None] * slopes + 3)


def test_adapting_keeps_the_type_and_says_so(caplog):
    half = {key: value.half() if value.is_floating_point() else value for key, value in copies(tiny_model(1)).items()}
    adapted = adapt_size(half, tiny_model(2, img_size=(64, 96)))
    assert {key: value.dtype for key, value in adapted.items()} == {key: value.dtype for key, value in half.items()}
    record, = caplog.records
    assert record.levelno == logging.WARNING
    assert "5 blocks are interpolated, in the first one from 8x8 to 16x24 tokens; fine-tune" in record.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_pretrained_of_another_size_and_class_count(layout):
    source, target = tiny_model(1), tiny_model(2, img_size=(64, 96), num_classes=3)
    weights = copies(source)
    expected = adapt_size(weights, target)
    assert load_pretrained(target, as_stored(weights, layout)) == ["head.weight", "head.bias"]
    after = copies(target)
    assert same(after, expected | {key: after[key] for key in ("head.weight", "head.bias")})
    assert target.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 3)


def test_weights_that_contradict_one_another_are_not_adapted():
    weights = copies(tiny_model(1))
    weights[CGSMM + "row_strip.bias"] = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="do not fit the model in 6 places") as error:
        load_pretrained(tiny_model(2, img_size=64), weights)
    assert CGSMM + "row_strip.bias is (2, 4) in the file, (2, 16) in the model" in str(error.value)


# ---- starting a training from weights ------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_pretrained_all(layout):
    source, target = tiny_model(1), tiny_model(2)
    assert load_pretrained(target, {"model": as_stored(copies(source), layout)}) == []
    assert same(copies(source), copies(target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_pretrained_with_another_class_count(layout):
    source, target = tiny_model(1), tiny_model(2, num_classes=3)
    before = copies(target)
    weights = copies(source)
    assert load_pretrained(target, {"model": as_stored(weights, layout)}) == ["head.weight", "head.bias"]
    head = ("head.weight", "head.bias")
    assert same(copies(target), weights | {key: before[key] for key in head})
    assert before["head.weight"].shape == (3, 64)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    source.eval()
    target.eval()
    with torch.no_grad():
        assert torch.equal(source.forward_features(images), target.forward_features(images))


def test_load_pretrained_refuses_a_mismatch_beside_the_head():
    target = tiny_model(2, num_classes=3, embed_dim=16)
    before = copies(target)
    with pytest.raises(ValueError, match=r"shape: stem\.weight is \(8, 3, 4, 4\) in the file, \(16, 3, 4, 4\)"):
        load_pretrained(target, copies(tiny_model(1)))
    assert same(copies(target), before)


def test_load_pretrained_of_a_timm_model():
    torch.manual_seed(0)
    source, target = (timm.create_model("resnet10t", num_classes=n) for n in (5, 3))
    weights = copies(source)
    assert load_pretrained(target, weights) == ["fc.weight", "fc.bias"]
    after, head = copies(target), ("fc.weight", "fc.bias")
    assert same(after, weights | {key: after[key] for key in head})
    assert after["fc.weight"].shape == (3, 512)


# ---- weights that mean nothing -------------------------------------------------------------------

@pytest.mark.parametrize(("spoil", "message"), [
    (lambda value: value * torch.nan, "not finite: head.weight"),
    (lambda value: value.double() * 1e300, "not finite: head.weight"),  # finite there, infinite in float32
    (lambda value: value.to(torch.int8), "head.weight is torch.int8"),
    (lambda value: value > 0, "head.weight is torch.bool"),
    (lambda value: value.to(torch.complex64), "head.weight is torch.complex64"),
    (lambda value: value.to(torch.float8_e5m2), "head.weight is torch.float8_e5m2"),
    (lambda value: value.tolist(), "head.weight"),
])
def test_meaningless_weights_are_refused(spoil, message):
    model = tiny_model(0)
    before = copies(model)
    weights = copies(tiny_model(1))
    weights["head.weight"] = spoil(weights["head.weight"])
    with pytest.raises(ValueError, match=message):
        load_strict(model, weights)
    assert same(copies(model), before)


def test_a_variance_below_zero_is_refused():
    """Its square root, and all that the network gives, would be not a number."""
    model = tiny_model(0)
    weights = copies(model)
    key = next(key for key in weights if key.endswith("running_var"))
    weights[key] = weights[key] - 2
    with pytest.raises(ValueError, match=f"{key} holds a variance below 0"):
        load_strict(model, weights)


def test_a_long_list_of_what_does_not_fit_is_cut():
    weights = copies(tiny_model(0)) | {f"odd{i}": torch.zeros(1) for i in range(1000)}
    with pytest.raises(ValueError, match=r"in 1000 places") as caught:
        load_strict(tiny_model(0), weights)
    assert str(caught.value).count("\n") == 101 and str(caught.value).endswith("... and 900 more")


def test_counts_of_another_type_are_refused():
    model = tiny_model(0)
    weights = {key: value.float() for key, value in copies(model).items()}
    with pytest.raises(ValueError, match="num_batches_tracked has the type torch.float32, not torch.int64"):
        load_strict(model, weights)


def test_half_precision_weights_are_loaded():
    source, target = tiny_model(0), tiny_model(1)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in copies(source).items()}
    load_strict(target, weights)
    assert same(copies(target), {key: value.to(source.state_dict()[key].dtype) for key, value in weights.items()})


@pytest.mark.parametrize("shape", [
    (0, 8, 1, 3), (16, 0, 1, 3), (15, 8, 1, 3), (16, 8, 2, 3), (16, 8), (), (16, 8, 1, 0),
])
def test_released_strips_of_odd_shapes_are_named(shape):
    model = tiny_model(0)
    released = to_released_state_dict(copies(model))
    released["blocks1.0.token_mixing.smlp_block.proj_h.weight"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"shape: stages\.0\.0\.token_mixing\.cgsmm\.row_strip\.weight is "):
        load_pretrained(model, released)
