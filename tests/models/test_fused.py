"""The inference form equals the network that it was made from."""

import copy

import pytest
import torch
import torch.nn.functional as F

import models.strip_mlp
from models import StripMLPNet
from models.ablations import build_ablated
from models.fused import FusedChannelMixingBlock, FusedStripMixingBlock
from models.strip_mlp import Block
from tests.nets import draw, randomise, relative_error
from utils import InputError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trained(dtype=torch.float64, build=StripMLPNet, **kwargs):
    """A network whose every parameter and statistic is drawn, so that nothing that is folded is trivial."""
    generator = torch.Generator().manual_seed(0)
    options = {"img_size": 32, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_classes": 7} | kwargs
    net = build(**options).double()
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            scale = value[0].numel() ** -0.5 if value.ndim == 4 and "grn" not in name else 0.3
            value.copy_(noise.abs() + 0.5 if "running_var" in name else noise * scale + (value.ndim == 1))
    return net.to(dtype).eval()


def images(*size, dtype=torch.float64):
    return torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kwargs", [{}, {"num_patches": 4}, {"img_size": (32, 64)}, {"strip_width": 5}], ids=str)
@torch.no_grad()
def test_equals_the_network(kwargs, dtype, tolerance):
    net = trained(dtype, **kwargs)
    x = images(*net.img_size, dtype=dtype)
    features, logits = net.forward_features(x), net(x)
    fused = copy.deepcopy(net).fuse()
    assert relative_error(fused(x), logits) < tolerance
    assert relative_error(fused.forward_features(x), features) < tolerance
    fused.to(memory_format=torch.channels_last)
    assert relative_error(fused(x.contiguous(memory_format=torch.channels_last)), logits) < tolerance


def fused_by_kernels(block):
    fused = copy.deepcopy(block).fuse().to(DEVICE, torch.float32)
    for mixing in (fused.token_mixing, fused.channel_mixing):
        mixing.form = "triton"
    return fused


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
# Maps of many tokens, of few, and one that is cut into windows.
@pytest.mark.parametrize("size, trained_size", [((4, 5), (4, 5)), ((2, 3), (2, 3)), ((6, 5), (4, 5))], ids=str)
@torch.no_grad()
def test_by_kernels(size, trained_size, layout, dtype, tolerance):
    pytest.importorskip("triton")
    block = randomise(Block(4, trained_size, 2, 3, 3.0, drop_path=0.1)).eval()
    x = draw(2, 4, *size).contiguous(memory_format=layout)
    fused = fused_by_kernels(block)
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.float16):
        y = fused(x.to(DEVICE, dtype))
    assert y.dtype == dtype and relative_error(y.cpu(), block(x)) < tolerance


def test_gradient_of_the_images():
    """By the plain form, since the kernels have none; also where GRN meets a channel that is 0 everywhere."""
    pytest.importorskip("triton")
    block, x = randomise(Block(4, (4, 5), 2, 3, 3.0, drop_path=0.1)).eval(), draw(2, 4, 4, 5).requires_grad_()
    with torch.no_grad():
        block.channel_mixing.fc1.bias[0] = -100
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    (found,) = torch.autograd.grad(fused_by_kernels(block)(x.to(DEVICE, torch.float32)).sum(), x)
    assert relative_error(found, expected) < 1e-5


@torch.no_grad()
def test_every_block_is_fused_and_norms_are_gone():
    net = trained()
    assert fused_norms(net) == (5 * 3 + 1)  # three in each of the five blocks, and the last
    net.fuse().fuse()  # the second time there is nothing left to do
    assert fused_norms(net) == (5 * 1 + 1)
    for stage in net.stages:
        for block in stage:
            assert type(block.token_mixing) is FusedStripMixingBlock
            assert type(block.channel_mixing) is FusedChannelMixingBlock
    assert not any(p.requires_grad for stage in net.stages for p in stage.parameters())


def fused_norms(net):
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in net.modules())


@torch.no_grad()
def test_another_ingredient_is_refused_and_the_network_stays(monkeypatch):
    net, x = trained(torch.float32), images(32, 32, dtype=torch.float32)
    monkeypatch.setattr(models.strip_mlp.F, "gelu", F.silu)
    expected = net(x)
    with pytest.raises(InputError, match="outputs differ from the network's by .* change them there too"):
        net.fuse()
    assert torch.equal(net(x), expected) and all(p.requires_grad for p in net.parameters())


@torch.no_grad()
def test_the_input_is_left_as_it_is():
    net, x = trained().fuse(), images(32, 32)
    before = x.clone()
    first, second = net(x), net(x)
    assert torch.equal(x, before) and torch.equal(first, second)
    block = net.stages[0][0]
    y = images(8, 8).repeat(1, 6, 1, 1)[:, :16]
    before = y.clone()
    block(y)
    assert torch.equal(y, before)


@torch.no_grad()
def test_ablated_token_mixing_stays():
    net = trained(build=build_ablated, mixers="cgsmm", cascade=False, shortcuts=True)
    x = images(32, 32)
    logits = net(x)
    assert relative_error(net.fuse()(x), logits) < 1e-12
    assert fused_norms(net) == 5 * 3 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bits_are_no_other_ingredient(dtype):
    """Their rounding is larger than what tells two networks of 32 bits apart."""
    net, x = trained(torch.float32), images(32, 32, dtype=torch.float32)
    assert relative_error(copy.deepcopy(net).to(dtype).fuse()(x.to(dtype)).float(), net(x)) < 0.1


@torch.no_grad()
def test_autocast():
    net, x = trained(torch.float32), images(32, 32, dtype=torch.float32)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        plain, fused = net(x).float(), copy.deepcopy(net).fuse()(x).float()
    assert relative_error(fused, exact) < 2 * relative_error(plain, exact) < 0.2


@torch.no_grad()
def test_compiles_without_a_graph_break():
    net, x = trained(torch.float32, depths=(1, 1, 1, 1)).fuse(), images(32, 32, dtype=torch.float32)
    assert relative_error(torch.compile(net, backend="eager", fullgraph=True)(x), net(x)) < 1e-5
