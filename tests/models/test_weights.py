"""State dicts of either kind, loaded in part or strictly."""

import pytest
import timm
import torch

from models import (
    StripMLPNet,
    convert_released_state_dict,
    load_pretrained,
    load_strict,
    model_state_dict,
    to_released_state_dict,
)


def tiny_model(seed, num_classes=5, **kwargs):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_patches": 2} | kwargs
    model = StripMLPNet(num_classes=num_classes, **sizes)
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
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_model_state_dict(prefix, released, nested):
    weights = copies(tiny_model(0))
    stored = to_released_state_dict(weights) if released else weights
    stored = {prefix + key: value for key, value in stored.items()}
    checkpoint = {"model": stored, "epoch": 3, "max_accuracy": 1.5, "optimizer": {}} if nested else stored
    found = model_state_dict(checkpoint)
    assert same(found, weights)
    assert list(found) == list(weights)


def test_prefixes_are_stripped_at_the_beginning_only():
    stored = {"module.a.module.weight": torch.ones(1), "b._orig_mod.bias": torch.ones(1), "modules.c": torch.ones(1)}
    assert list(model_state_dict(stored)) == ["a.module.weight", "b._orig_mod.bias", "modules.c"]


@pytest.mark.parametrize("checkpoint, named", [
    ({}, "none"), ({"model": {}}, "model"), ({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, "state_dict, epoch"),
    ({"model": torch.ones(1)}, "model"), ({"model": {"a": "b"}}, "model"), ({"epoch": 3}, "epoch"),
])
def test_no_weights(checkpoint, named):
    with pytest.raises(ValueError, match=f"no weights under 'model'; the entries are: {named}$"):
        model_state_dict(checkpoint)


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


def test_another_size_depth_or_p_is_refused_by_key():
    for kwargs, key in [
        ({"img_size": 64}, "stages.3.0.token_mixing.cgsmm.row_position.table is (3, 32) in the file, (5, 32)"),
        ({"depths": (1, 1, 1, 1)}, "unexpected: stages.2.1.token_mixing.conv_norm.weight"),
        ({"num_patches": 4}, "cgsmm.row_strip.weight is (2, 8, 8, 3) in the file, (1, 8, 8, 3) in the model"),
    ]:
        with pytest.raises(ValueError) as error:
            load_pretrained(tiny_model(2, **kwargs), copies(tiny_model(1)))
        assert key in str(error.value)


# ---- starting a training from weights ------------------------------------------------------------

@pytest.mark.parametrize("released", [False, True])
def test_load_pretrained_all(released):
    source, target = tiny_model(1), tiny_model(2)
    weights = to_released_state_dict(copies(source)) if released else copies(source)
    assert load_pretrained(target, {"model": weights}) == []
    assert same(copies(source), copies(target))


@pytest.mark.parametrize("released", [False, True])
def test_load_pretrained_with_another_class_count(released):
    source, target = tiny_model(1), tiny_model(2, num_classes=3)
    before = copies(target)
    weights = copies(source)
    stored = to_released_state_dict(weights) if released else weights
    assert load_pretrained(target, {"model": stored}) == ["head.weight", "head.bias"]
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
