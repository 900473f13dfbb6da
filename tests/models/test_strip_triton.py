"""The strip operator's Triton kernels: on the GPU where there is one, else in Triton's interpreter."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.strip_ops import strip_mix, strip_mix_into, strip_mix_plain
from tests.models.test_strip_ops import AXES, draw
from tests.nets import relative_error

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_mix = partial(strip_mix, form="triton")

# C_in, H, W, P, images, strip width: powers of two and not, one token, blocks of lines that end within a map
SHAPES = [(4, 7, 7, 2, 3, 3), (2, 16, 16, 1, 1, 3), (4, 5, 9, 2, 2, 5), (4, 8, 6, 4, 1, 1), (2, 1, 1, 1, 3, 3)]
STAGES = [(40, 56, 56, 2, 5, 3), (80, 28, 28, 2, 5, 3), (192, 14, 14, 4, 5, 3), (320, 7, 7, 2, 5, 3)]
STAGES += [(56, 56, 56, 4, 128, 3), (40, 64, 112, 2, 2, 3)]


def results(form, tensors, axis, grad):
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = form(*tensors, axis)
    return dict(zip(("y", "x", "weight", "bias"), (y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))), strict=True))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.cuda) for s in STAGES], ids=str)
def test_against_the_plain_form(shape, dtype, tolerance, axis):
    c, h, w, p, n, width = shape
    if DEVICE == "cpu" and shape in STAGES:
        pytest.skip("needs a CUDA GPU")
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("needs a CUDA GPU: Triton's interpreter multiplies no bfloat16")
    x, weight, bias = (t.to(DEVICE) for t in draw(n, c, h, w, p, width, axis))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(DEVICE)
    # Weights and biases stay in 32 bits, as autocast's do; what they are rounded to is the kernel's business.
    found = results(triton_mix, (x.to(dtype), weight.float(), bias.float()), axis, grad)
    expected = results(strip_mix_plain, (x.to(dtype).double(), weight.float().double(), bias), axis, grad)
    for name, value in found.items():
        assert value.dtype == (dtype if name in ("y", "x") else torch.float32)
        assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("axis", AXES)
def test_layouts_and_missing_bias(axis):
    x, weight, bias = (t.float().to(DEVICE) for t in draw(2, 8, 7, 7, 2, 3, axis))
    expected = triton_mix(x, weight, bias, axis)
    for layout in (x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], dim=1)[:, :8],
                   x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(triton_mix(layout, weight, bias, axis), expected)
    along = bias.repeat(2, 1)[:, None, :] if axis == "row" else bias.repeat(2, 1)[:, :, None]
    torch.testing.assert_close(triton_mix(x, weight, None, axis) + along, expected)


@pytest.mark.parametrize("axis", AXES)
def test_position_is_added_as_the_map_is_read(axis):
    x, weight, bias = (t.float().to(DEVICE) for t in draw(3, 4, 5, 9, 2, 3, axis))
    position = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def added_before(x, weight, bias, position, axis):
        return strip_mix_plain(x + position, weight, bias, axis)

    def added_inside(x, weight, bias, position, axis):
        return triton_mix(x, weight, bias, axis, position=position)

    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found, expected = [], []
    for form, values in ((added_inside, found), (added_before, expected)):
        tensors = [t.clone().requires_grad_() for t in (x, weight, bias, position)]
        y = form(*tensors, axis)
        values += [y, *torch.autograd.grad(y, tensors, dy)]
    for value, reference in zip(found, expected, strict=True):
        assert value.shape == reference.shape and relative_error(value, reference) < 1e-5


@pytest.mark.parametrize("axis", AXES)
def test_into_a_part_of_a_map(axis):
    x, weight, bias = (t.float().to(DEVICE) for t in draw(3, 4, 5, 9, 2, 3, axis))
    position = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    maps = torch.full((3, 12, 5, 9), 7.0, device=DEVICE)
    before, y, given = maps.chunk(3, dim=1)
    given.copy_(x)
    strip_mix_into(y, given, weight, bias, axis, position)
    assert torch.equal(y, triton_mix(x, weight, bias, axis, position=position))
    assert (before == 7).all() and torch.equal(given, x)


@pytest.mark.parametrize("axis", AXES)
def test_as_a_pytorch_operator(axis):
    """Its shapes without data, its backward's registration, and compilation, as PyTorch itself checks them."""
    from models import strip_triton

    x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in draw(1, 4, 3, 5, 2, 3, axis))
    position = torch.ones(x.shape[1:], device=DEVICE, requires_grad=True)
    torch.library.opcheck(strip_triton.mix, (x, position, weight, bias, axis, False))
    dy = torch.ones_like(x).detach()
    y = torch.empty_like(x).detach()
    torch.library.opcheck(strip_triton.mix_into, (x.detach(), position.detach(), weight, bias, y, axis, False))
    torch.library.opcheck(strip_triton.weight_grad, (x.detach(), position.detach(), dy, 2, 3, axis, False))


@pytest.mark.slow
def test_compiled_network_has_no_graph_break(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    from models import StripMLPNet
    from models.strip_mlp import StripMLP

    torch.manual_seed(0)
    net = StripMLPNet(img_size=32, embed_dim=4, depths=(1, 1, 1, 1), num_classes=3, drop_path_rate=0.0).to(DEVICE)
    images = torch.randn(6, 3, 32, 32, device=DEVICE)
    expected = torch.autograd.grad(net(images).square().sum(), list(net.parameters()))
    for module in net.modules():
        if isinstance(module, StripMLP):
            module.form = "triton"
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(images).square().sum(), list(net.parameters()))
    assert relative_error(*(torch.cat([g.flatten() for g in grads]) for grads in (found, expected))) < 1e-4


def test_full_precision_and_determinism_allow_the_smallest_blocks_alone(monkeypatch):
    from models.strip_triton import MIX_BLOCKS, smallest_blocks, worth_trying

    configs = MIX_BLOCKS[:1] + ["larger"]
    tensors = {dtype: {"x": torch.zeros(1, dtype=dtype)} for dtype in (torch.float32, torch.bfloat16)}
    assert worth_trying(configs, tensors[torch.float32], PRECISION="ieee", grid=None) == configs[:1]
    assert worth_trying(configs, tensors[torch.float32], PRECISION="tf32") == configs
    assert worth_trying(configs, tensors[torch.bfloat16], PRECISION="ieee") == configs
    with smallest_blocks():
        assert worth_trying(configs, tensors[torch.bfloat16], PRECISION="ieee") == configs[:1]
    assert worth_trying(configs, tensors[torch.bfloat16], PRECISION="ieee") == configs
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert worth_trying(configs, tensors[torch.bfloat16], PRECISION="ieee") == configs[:1]


@pytest.mark.parametrize("axis", AXES)
def test_operations_are_counted_as_in_the_other_forms(axis):
    counts = []
    for form in ("triton", "matmul"):
        x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in draw(2, 8, 3, 5, 2, 3, axis))
        with FlopCounterMode(display=False) as counter:
            strip_mix(x, weight, bias, axis, form).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * x.numel() * weight.shape[1] * 3
