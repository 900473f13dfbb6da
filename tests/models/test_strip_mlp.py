"""The modules against re-implementations that follow their definitions sentence by sentence, and the network."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import nn

import engine
from config import load_config
from models.strip_mlp import (
    CGSMM,
    GRN,
    LSMM,
    VARIANTS,
    Block,
    ChannelMixingBlock,
    DropPathAdd,
    RelativePosition,
    StripMixingBlock,
)
from optimizer import build_optimizer
from tests.models.test_strip_layer import strip
from tests.nets import draw, randomise, shapes, tiny_net


def check(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


# ---- modules -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dim, size", [(3, 1), (4, 2), (5, (7, 7)), (3, (2, 5)), (3, (4, 1))])
def test_relative_position(dim, size):
    """pos[c, i, j] = table[clamp(j - i, -H, W) + H, c], which for a square map is the released formula."""
    position = randomise(RelativePosition(dim, size))
    height, width = size if isinstance(size, tuple) else (size, size)
    assert position.table.shape == (height + width + 1, dim)
    x, grad = draw(2, dim, height, width), draw(2, dim, height, width, seed=2)
    expected, table_grad = x.clone(), torch.zeros_like(position.table)
    for c in range(dim):
        for i in range(height):
            for j in range(width):
                row = max(-height, min(width, j - i)) + height
                expected[:, c, i, j] += position.table[row, c].item()
                table_grad[row, c] += grad[:, c, i, j].sum()
    y = position(x)
    check(y.detach(), expected)
    y.backward(grad)
    check(position.table.grad, table_grad)


def test_initialisation():
    """Position tables: truncated normal of std 0.02; GRN: zeros; strip layers: PyTorch's default of a convolution."""
    torch.manual_seed(0)
    table = RelativePosition(400, 56).table.detach()
    assert float(table.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(table.mean())) < 0.001
    grn = GRN(12)
    assert grn.gamma.shape == grn.beta.shape == (1, 1, 1, 12)
    assert not grn.gamma.any()
    assert not grn.beta.any()
    strip = CGSMM(400, 14, 2).row_strip
    bound = (14 * 3) ** -0.5
    for parameter in (strip.weight.detach(), strip.bias.detach()):
        assert float(parameter.abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(parameter.std()) == pytest.approx(bound / 3**0.5, rel=0.03)


def test_grn():
    grn = randomise(GRN(6))
    x = draw(2, 3, 4, 6)
    expected = torch.empty_like(x)
    for n in range(2):
        norms = [sum(x[n, h, w, c].item() ** 2 for h in range(3) for w in range(4)) ** 0.5 for c in range(6)]
        for c in range(6):
            response = norms[c] / (sum(norms) / 6 + 1e-6)
            gamma, beta = grn.gamma[0, 0, 0, c].item(), grn.beta[0, 0, 0, c].item()
            expected[n, :, :, c] = gamma * (x[n, :, :, c] * response) + beta + x[n, :, :, c]
    check(grn(x).detach(), expected)
    assert torch.equal(GRN(6)(x.float()), x.float())  # the identity at the start
    dead = torch.zeros(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    grn(dead).sum().backward()
    assert torch.isfinite(dead.grad).all()


def test_lsmm():
    """a of kernel (3, 7), b of (7, 3); b * s0 + a * s1 + x * s2, the weights from the pooled a + b + x."""
    lsmm = randomise(LSMM(6))
    x = draw(3, 6, 5, 5)
    p = dict(lsmm.named_parameters())
    assert {key: tuple(value.shape) for key, value in p.items()} == {
        "row_conv.weight": (6, 1, 3, 7), "column_conv.weight": (6, 1, 7, 3),
        "reweight_fc1.weight": (3, 6, 1, 1), "reweight_fc1.bias": (3,),
        "reweight_fc2.weight": (18, 3, 1, 1), "reweight_fc2.bias": (18,),
    }
    a = torch.cat([F.conv2d(x[:, c:c + 1], p["row_conv.weight"][c:c + 1], padding=(1, 3)) for c in range(6)], 1)
    b = torch.cat([F.conv2d(x[:, c:c + 1], p["column_conv.weight"][c:c + 1], padding=(3, 1)) for c in range(6)], 1)
    pooled = (a + b + x).sum((2, 3)) / 25
    hidden = F.gelu(pooled @ p["reweight_fc1.weight"][:, :, 0, 0].T + p["reweight_fc1.bias"])
    scores = hidden @ p["reweight_fc2.weight"][:, :, 0, 0].T + p["reweight_fc2.bias"]
    expected = torch.empty_like(x)
    for n in range(3):
        for c in range(6):
            s = scores[n, 3 * c:3 * c + 3].exp()
            s = s / s.sum()
            expected[n, c] = b[n, c] * s[0] + a[n, c] * s[1] + x[n, c] * s[2]
    check(lsmm(x), expected)


def position_map(table, height, width):
    index = (torch.arange(width)[None, :] - torch.arange(height)[:, None]).clamp(-height, width) + height
    return table[index].permute(2, 0, 1)  # (H, W, C) -> (C, H, W)


def conv1x1(x, weight):
    return torch.einsum("nchw,dc->ndhw", x, weight[:, :, 0, 0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("height, width", [(5, 5), (3, 6)])
@pytest.mark.parametrize("num_patches, strip_width", [(2, 3), (1, 5), (4, 1)])
def test_cgsmm(num_patches, strip_width, height, width, training):
    cgsmm = randomise(CGSMM(8, (height, width), num_patches, strip_width)).train(training)
    assert (cgsmm.row_strip.weight.shape[1], cgsmm.column_strip.weight.shape[1]) == (width, height)
    x = draw(3, 8, height, width)
    p = dict(cgsmm.named_parameters()) | {key: value.clone() for key, value in cgsmm.named_buffers()}
    row_position = position_map(p["row_position.table"], height, width)
    r = strip(x + row_position, p["row_strip.weight"], p["row_strip.bias"], "row")
    f = conv1x1(torch.cat([r, x], 1), p["row_fuse.weight"])
    mean, variance = p["norm.running_mean"], p["norm.running_var"]
    if training:
        mean, variance = f.mean((0, 2, 3)), f.var((0, 2, 3), unbiased=False)
    f = (f - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    f = F.gelu(f * p["norm.weight"][:, None, None] + p["norm.bias"][:, None, None])
    f = f + position_map(p["column_position.table"], height, width)
    q = strip(f, p["column_strip.weight"], p["column_strip.bias"], "column")
    check(cgsmm(x), conv1x1(torch.cat([x, q], 1), p["column_fuse.weight"]))


def test_strip_mixing_block():
    """BN, GELU, 3x3 depthwise; 1x1, BN, GELU; CGSMM on the first half, LSMM on the second; 1x1."""
    block = randomise(StripMixingBlock(8, 4, 2)).eval()
    x = draw(2, 8, 4, 4)
    assert (block.conv.bias, block.proj_out.bias, block.proj_in.bias.shape) == (None, None, (8,))
    y = F.conv2d(F.gelu(block.conv_norm(x)), block.conv.weight, padding=1, groups=8)
    y = F.gelu(block.proj_norm(conv1x1(y, block.proj_in.weight) + block.proj_in.bias[:, None, None]))
    halves = torch.cat([block.cgsmm(y[:, :4]), block.lsmm(y[:, 4:])], 1)
    check(block(x), conv1x1(halves, block.proj_out.weight))


@pytest.mark.parametrize("mlp_ratio, hidden", [(3.0, 24), (2.5, 20)])
def test_channel_mixing_block(mlp_ratio, hidden):
    block = randomise(ChannelMixingBlock(8, mlp_ratio))
    x = draw(2, 8, 5, 5)
    assert block.conv.bias is None
    assert block.norm.eps == 1e-5
    assert block.fc1.weight.shape == (hidden, 8)
    y = F.conv2d(x, block.conv.weight, padding=3, groups=8).permute(0, 2, 3, 1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = F.gelu((y * block.norm.weight + block.norm.bias) @ block.fc1.weight.T + block.fc1.bias)
    y = block.grn(y) @ block.fc2.weight.T + block.fc2.bias
    check(block(x), y.permute(0, 3, 1, 2))


def test_drop_path_is_timm_s():
    """The same images are dropped, and the same gradients come back."""
    x, branch = (draw(16, 8, 4, 4).requires_grad_() for _ in range(2))
    for rate in (0.0, 0.3):
        found, expected = DropPathAdd(rate), DropPath(rate)
        torch.manual_seed(1)
        y = found(x, branch)
        torch.manual_seed(1)
        reference = x + expected(branch)
        check(y, reference)
        for gradient, other in zip(*(torch.autograd.grad(out.square().sum(), (x, branch)) for out in (y, reference)),
                                   strict=True):
            check(gradient, other)


def test_block_drops_both_branches_image_by_image():
    block = randomise(Block(8, 4, 2, 3, 3.0, drop_path=0.5))
    x = draw(64, 8, 4, 4)
    block.eval()
    y = x + block.token_mixing(x)
    check(block(x), y + block.channel_mixing(y))  # no drop path in eval mode
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    block.drop_path.train()
    torch.manual_seed(0)
    result = block(x)
    kept_both = x + 2 * block.token_mixing(x)
    kept_both = kept_both + 2 * block.channel_mixing(kept_both)
    expected = {  # a branch that is kept counts 1 / (1 - rate)
        "neither": x, "token": x + 2 * block.token_mixing(x), "channel": x + 2 * block.channel_mixing(x),
        "both": kept_both,
    }
    counts = dict.fromkeys(expected, 0)
    for n in range(64):
        fitting = [name for name, value in expected.items() if torch.allclose(result[n], value[n], rtol=1e-10)]
        assert len(fitting) == 1
        counts[fitting[0]] += 1
    assert min(counts.values()) >= 6  # 16 expected of each


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("module, shape", [
    (RelativePosition(8, 6), (4, 8, 6, 6)), (GRN(8), (4, 6, 6, 8)), (LSMM(8), (4, 8, 6, 6)),
], ids=lambda value: type(value).__name__)
def test_autocast_keeps_feature_maps_in_16_bits(module, shape, device):
    """Neither the result nor what is kept for the backward pass is a map of 32 bits, and the result is right."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    module = randomise(copy.deepcopy(module)).float().to(device)
    x = draw(*shape).float().to(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16):
            y = module(x.bfloat16().requires_grad_())
    assert y.dtype == torch.bfloat16
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.float32 and tensor.numel() >= x.numel()]
    torch.testing.assert_close(y.float(), module(x), rtol=0.02, atol=0.1)


# ---- the network ---------------------------------------------------------------------------------

def test_network_topology():
    """Stem, stages, mergings and the cross-stage shortcuts, wired by hand."""
    net = randomise(tiny_net()).eval()
    x = draw(2, 3, 32, 32)
    stage1, stage2, stage3, stage4 = net.stages
    m1 = net.merging[0](stage1(net.stem(x)))
    m2 = net.merging[1](stage2(m1))
    s = net.shortcut_m1(m1)
    m3 = net.merging[2](stage3(m2 + s))
    t, u = net.shortcut_s(s), net.shortcut_m2(m2)
    last = net.norm(stage4(m3 + t + u))
    check(net.forward_features(x), last)
    check(net(x), last.mean((2, 3)) @ net.head.weight.T + net.head.bias)
    assert [m.bias for m in (net.stem, *net.merging, net.shortcut_m1, net.shortcut_s, net.shortcut_m2)] == [None] * 7
    assert (net.shortcut_m1.groups, net.shortcut_s.groups, net.shortcut_m2.groups) == (16, 32, 32)


@pytest.mark.parametrize("img_size, patch_size, sides", [
    (64, 4, [16, 8, 4, 2]), (32, 2, [16, 8, 4, 2]), ((96, 96), 4, [24, 12, 6, 3]),
    ((32, 96), 4, [(8, 24), (4, 12), (2, 6), (1, 3)]), ((48, 16), 2, [(24, 8), (12, 4), (6, 2), (3, 1)]),
])
def test_shapes_of_the_stages(img_size, patch_size, sides):
    height, width = to_2tuple(img_size)
    sides = [to_2tuple(side) for side in sides]
    net = tiny_net(img_size=img_size, patch_size=patch_size).eval()
    found = []
    for blocks in net.stages:
        blocks[-1].register_forward_hook(lambda module, args, output: found.append(tuple(output.shape)))
    with torch.no_grad():
        images = torch.zeros(2, 3, height, width)
        assert net(images).shape == (2, 5)
        assert net.forward_features(images).shape == (2, 64, *sides[3])
        assert net.forward_head(torch.zeros(2, 64, 3, 3), pre_logits=True).shape == (2, 64)
    assert found[:4] == [(2, 8 * 2**i, *side) for i, side in enumerate(sides)]
    assert [info["num_chs"] for info in net.feature_info] == [8, 16, 32, 64]
    strides = [info["reduction"] for info in net.feature_info]
    assert [(height // stride, width // stride) for stride in strides] == sides


def test_images_of_a_batch_do_not_meet_in_eval_mode():
    net = randomise(tiny_net()).eval()
    x = draw(3, 3, 32, 32)
    with torch.no_grad():
        check(net(x), torch.cat([net(image[None]) for image in x]))


def rates(net):
    return [block.drop_path.drop_prob if isinstance(block.drop_path, DropPath) else 0.0
            for stage in net.stages for block in stage]


def test_drop_path_rates():
    depths = (2, 2, 6, 2)
    assert rates(tiny_net(depths=depths)) == [0.1] * 12  # as in the released network
    assert rates(tiny_net(depths=depths, drop_path_rate=0.3)) == [0.3] * 12
    linear = tiny_net(depths=depths, drop_path_rate=0.3, drop_path_schedule="linear")
    assert rates(linear) == pytest.approx([0.3 * i / 11 for i in range(12)], rel=1e-12)
    assert rates(tiny_net(drop_path_rate=0.0)) == [0.0] * 5
    with pytest.raises(ValueError, match="drop_path_schedule 'cosine' is neither 'constant' nor 'linear'"):
        tiny_net(drop_path_schedule="cosine")


def test_drop_path_is_off_in_eval_mode():
    images = draw(2, 3, 32, 32)
    with torch.no_grad():
        with_rate, without = (randomise(tiny_net(drop_path_rate=rate)).eval()(images) for rate in (0.9, 0.0))
        assert torch.equal(with_rate, without)
        torch.manual_seed(0)
        net = randomise(tiny_net(drop_path_rate=0.9)).train()
        assert not torch.allclose(net(images), net(images))


def run(net, call, images, seed=3):
    """Loss, gradients and buffers of a forward pass through ``call`` and a backward pass."""
    torch.manual_seed(seed)  # of drop path
    loss = F.cross_entropy(call(images), torch.arange(len(images), device=images.device) % 5)
    loss.backward()
    return {"loss": loss.detach()} | {key: p.grad for key, p in net.named_parameters()} | dict(net.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_nothing(training):
    """Not a bit, drop path and BatchNorm's statistics included."""
    plain = randomise(tiny_net(drop_path_rate=0.3)).train(training)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    images, calls = draw(6, 3, 32, 32), []
    checkpointed.stages[2][1].register_forward_pre_hook(lambda *args: calls.append(1))
    expected, found = run(plain, plain, images), run(checkpointed, checkpointed, images)
    assert len(calls) == 2  # forward, and again for the backward pass
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    tracked = [value for key, value in found.items() if key.endswith("num_batches_tracked")]
    assert tracked == [int(training)] * 16
    with torch.no_grad():
        checkpointed(images)
    assert len(calls) == 3  # nothing to recompute
    checkpointed.set_grad_checkpointing(False)
    run(checkpointed, checkpointed, images)
    assert len(calls) == 4


# ---- what the network refuses --------------------------------------------------------------------

@pytest.mark.parametrize("kwargs, message", [
    ({"img_size": 230}, r"img_size 230 is not a multiple of 32 \(patch size 4 x 8\); .* sizes are 224 and 256"),
    ({"img_size": 255}, "the nearest valid sizes are 224 and 256"),
    ({"img_size": 16}, "img_size 16 is not a multiple of 32 .* the nearest valid sizes are 32 and up"),
    ({"img_size": 0}, "the nearest valid sizes are 32 and up"),
    ({"img_size": 24, "patch_size": 2}, r"multiple of 16 \(patch size 2 x 8\); the nearest valid sizes are 16 and 32"),
    ({"img_size": (64, 64, 64)}, r"img_size \(64, 64, 64\) is neither a single side nor \(height, width\)"),
    ({"img_size": (64, 40)}, "img_size 40 is not a multiple of 32 .* the nearest valid sizes are 32 and 64"),
    ({"global_pool": "max"}, "global_pool 'max' must be 'avg', or '' .no pooling. with num_classes 0"),
    ({"global_pool": ""}, "with num_classes 0"),
    ({"embed_dim": 12, "num_patches": 4}, r"embed_dim 12 is not a multiple of 2 x num_patches \(8\)"),
    ({"embed_dim": 7, "num_patches": 1}, r"embed_dim 7 is not a multiple of 2 x num_patches \(2\)"),
    ({"strip_width": 2}, "strip_width 2 must be odd"),
    ({"strip_width": -1}, "strip_width -1 must be odd, at least 1"),
    ({"num_patches": 0}, "num_patches 0 must be at least 1"),
    ({"depths": (1, 1, 1)}, r"depths \(1, 1, 1\) must be four numbers"),
    ({"depths": (1, 1, 0, 1)}, "each at least 1"),
])
def test_sizes_that_do_not_fit(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_net(**kwargs)


def test_square_pair_as_img_size():
    assert shapes(tiny_net(img_size=(64, 64))) == shapes(tiny_net(img_size=64))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 3, 32, 64), (1, 3, 31, 32), (3, 32, 32)])
def test_images_of_another_size(shape):
    with pytest.raises(ValueError, match="this network was built for images of 32x32, got a batch of shape") as error:
        tiny_net()(torch.zeros(shape))
    assert str(shape) in str(error.value)
    for side in shape[-2:]:
        assert f"valid near {side}: " in str(error.value)


@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_image_of_an_illegal_size_names_the_neighbours(method):
    with pytest.raises(ValueError, match="images of 32x64, .*valid near 70: 64 and 96; valid near 20: 32 and up"):
        getattr(tiny_net(img_size=(32, 64)), method)(torch.zeros(1, 3, 70, 20))
    with pytest.raises(ValueError, match="images of 32x64, got a batch of shape .1, 3, 64, 32."):
        getattr(tiny_net(img_size=(32, 64)), method)(torch.zeros(1, 3, 64, 32))


# ---- options that change the parameters ----------------------------------------------------------

@pytest.mark.parametrize("kwargs, ends, change", [
    ({"mlp_ratio": 2.0}, ("fc1.weight", "fc1.bias", "grn.gamma", "grn.beta", "fc2.weight"),
     lambda shape, end: tuple(2 * n // 3 if i == {"fc1.weight": 0, "fc1.bias": 0, "fc2.weight": 1}.get(end, 3) else n
                              for i, n in enumerate(shape))),
    ({"num_patches": 4}, ("strip.weight", "strip.bias"), lambda shape, end: (shape[0] // 2, *shape[1:])),
    ({"num_patches": 1}, ("strip.weight", "strip.bias"), lambda shape, end: (shape[0] * 2, *shape[1:])),
    ({"strip_width": 5}, ("strip.weight",), lambda shape, end: (*shape[:3], 5)),
    ({"in_chans": 4}, ("stem.weight",), lambda shape, end: (shape[0], 4, *shape[2:])),
])
def test_what_an_option_changes(kwargs, ends, change):
    """Exactly the parameters that it should, to the shapes that it should; and the network still runs."""
    expected = {
        key: next((change(shape, end) for end in ends if key.endswith(end) and "lsmm" not in key), shape)
        for key, shape in shapes(tiny_net()).items()
    }
    net = tiny_net(**kwargs).eval()
    assert shapes(net) == expected != shapes(tiny_net())
    assert net(torch.zeros(1, kwargs.get("in_chans", 3), 32, 32)).shape == (1, 5)


# ---- whole steps ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "strip_mlp_tiny_light"))
                                  for name in VARIANTS])
def test_one_step_of_a_full_variant(name):
    """224x224, train mode: every parameter gets a finite gradient that is not zero throughout, and AdamW moves it."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, drop_path_rate=0.0).train()
    optimizer = build_optimizer(load_config("", ["MODEL.NAME", name]), net)
    loss = F.cross_entropy(net(torch.randn(1, 3, 224, 224)), torch.tensor([3]))
    loss.backward()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer.step()
    assert 0.5 < loss.item() < 6  # about ln 10
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
        assert p.grad.any(), key
        if not key.endswith("proj_in.bias"):  # which the BatchNorm behind it cancels, so that its gradient is rounding
            assert not torch.equal(p, before[key]), key
        assert (p - before[key]).abs().max() < 1.1e-3, key  # the first step of AdamW: at most the LR and the decay
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_training_step_equals_eager(checkpointing):
    eager = randomise(tiny_net(depths=(1, 1, 1, 1), drop_path_rate=0.3)).train()
    compiled = copy.deepcopy(eager)
    compiled.set_grad_checkpointing(checkpointing)
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    images = draw(4, 3, 32, 32)
    expected, found = run(eager, eager, images), run(compiled, call, images)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_training_step_compiled_with_our_options_equals_eager():
    """Inductor's kernels, combined ones among them, give the same loss, gradients and statistics."""
    eager = randomise(tiny_net(depths=(1, 1, 1, 1), drop_path_rate=0.0))
    eager = engine.to_device(eager, torch.device("cuda")).train()
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, options=engine.OPTIONS)
    images = draw(4, 3, 32, 32).to("cuda", memory_format=torch.channels_last)
    expected, found = run(eager, eager, images), run(compiled, call, images)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-10, msg=key)


def test_compiled_evaluation_equals_eager():
    net = randomise(tiny_net(depths=(1, 1, 1, 1))).eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.no_grad():
        check(compiled(draw(4, 3, 32, 32)), net(draw(4, 3, 32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_compiles_without_a_graph_break(variant):
    """Training with its backward, and evaluation."""
    torch.manual_seed(0)
    net = timm.create_model(variant, img_size=32, num_classes=3, drop_path_rate=0.1).train()
    images = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    losses = []
    for call in (net, torch.compile(net, fullgraph=True, backend="eager")):
        torch.manual_seed(1)  # of drop path
        net.zero_grad()
        losses.append(call(images).square().sum())
        losses[-1].backward()
        losses.append(sum(p.grad.abs().sum() for p in net.parameters()))
    torch.testing.assert_close(losses[2:], losses[:2], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        compiled = torch.compile(net.eval(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), net(images), rtol=1e-3, atol=1e-3)
