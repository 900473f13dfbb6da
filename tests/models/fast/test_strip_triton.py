"""The strip operator's Triton kernels: on the GPU where there is one, else in Triton's interpreter."""

from collections import defaultdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.models.test_strip_layer import AXES, draw, reference, strip
from tests.nets import relative_error

pytest.importorskip("triton")
from models.fast import strip_triton
from models.fast.strip_triton import MIX_BLOCKS, mix, smallest_blocks, weight_grad, worth_trying

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# C_in, H, W, P, images, strip width: powers of two and not, one token, blocks of lines that end within a map
SHAPES = [(4, 7, 7, 2, 3, 3), (2, 16, 16, 1, 1, 3), (4, 5, 9, 2, 2, 5), (4, 8, 6, 4, 1, 1), (2, 1, 1, 1, 3, 3)]
STAGES = [(40, 56, 56, 2, 5, 3), (80, 28, 28, 2, 5, 3), (192, 14, 14, 4, 5, 3), (320, 7, 7, 2, 5, 3)]
STAGES += [(56, 56, 56, 4, 128, 3), (40, 64, 112, 2, 2, 3)]


def results(compute, tensors, axis, grad):
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = compute(*tensors, axis)
    return dict(zip(("y", "x", "weight", "bias"), (y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))), strict=True))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(s, marks=pytest.mark.cuda) for s in STAGES], ids=str)
def test_against_the_formula(shape, dtype, tolerance, axis):
    c, h, w, p, n, width = shape
    if DEVICE == "cpu" and shape in STAGES:
        pytest.skip("needs a CUDA GPU")
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("needs a CUDA GPU: Triton's interpreter multiplies no bfloat16")
    x, weight, bias = (t.to(DEVICE) for t in draw(n, c, h, w, p, width, axis))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(DEVICE)
    # Weights and biases stay in 32 bits, as autocast's do; what they are rounded to is the kernel's business.
    found = results(mix, (x.to(dtype), weight.float(), bias.float()), axis, grad)
    expected = results(reference, (x.to(dtype).double(), weight.float().double(), bias), axis, grad)
    for name, value in found.items():
        assert value.dtype == (dtype if name in ("y", "x") else torch.float32)
        assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("axis", AXES)
def test_layouts_of_a_gradient(axis):
    """A transposed and an expanded one give what a contiguous one gives."""
    tensors = [t.float().to(DEVICE) for t in draw(2, 4, 3, 5, 2, 3, axis)]
    dy = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for grad in (dy.mT.contiguous().mT, dy[:, :1, :, :1].expand_as(dy)):
        found, expected = (results(mix, tensors, axis, given) for given in (grad, grad.contiguous()))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("axis", AXES)
def test_as_a_pytorch_operator(axis):
    """Its shapes without data, its backward's registration, and compilation, as PyTorch itself checks them."""
    x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in draw(1, 4, 3, 5, 2, 3, axis))
    torch.library.opcheck(mix, (x, weight, bias, axis))
    torch.library.opcheck(weight_grad, (x.detach(), torch.ones_like(x).detach(), 2, 3, axis))


def test_the_smallest_blocks_alone_where_runs_must_repeat(monkeypatch):
    configs = [*MIX_BLOCKS[:1], "larger"]
    assert worth_trying(configs, {}, ACROSS=7) == configs
    with smallest_blocks():
        assert worth_trying(configs, {}) == configs[:1]
    assert worth_trying(configs, {}) == configs
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert worth_trying(configs, {}) == configs[:1]


@pytest.mark.parametrize("axis", AXES)
def test_operations_are_counted_as_in_the_plain_form(axis):
    counts = []
    for compute in (mix, strip):
        x, weight, bias = (t.float().to(DEVICE).requires_grad_() for t in draw(2, 8, 3, 5, 2, 3, axis))
        with FlopCounterMode(display=False) as counter:
            compute(x, weight, bias, axis).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * x.numel() * weight.shape[1] * 3


def test_every_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Of two GPUs that are only pretended, the kernels run on the one that is not the current one."""
    entered, launched = [], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append(None)

    def tuned(kernel):
        return defaultdict(lambda: lambda *args, **kwargs: launched.append((kernel, entered[-1])))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(strip_triton, "_tuned", tuned)
    with FakeTensorMode(), torch.device("cuda:1"):
        x, weight, bias = torch.empty(2, 4, 5, 5), torch.empty(2, 5, 5, 3), torch.empty(2, 5)
        strip_triton.mix._init_fn(x, weight, bias, "row")
        strip_triton.weight_grad._init_fn(x, x, 2, 3, "row")
    expected = [(kernel, torch.device("cuda:1")) for kernel in (strip_triton._mix_kernel,
                                                                strip_triton._weight_grad_kernel)]
    assert launched == expected and entered[-1] is None
