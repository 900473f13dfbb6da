"""Global response normalisation's fast forms against the formula: values, gradients, precision."""

import pytest
import torch
import torch.nn.functional as F

from models.response_norm import channel_norm, grn, grn_linear, grn_plain, grn_scale, scaled_linear

SIZES = [(2, 5, 4, 6), (2, 2, 3, 12)]  # more tokens than channels, so that GRN goes into the weight, and fewer


def draw(n, h, w, c, out=5, dtype=torch.float64):
    """x, gamma, beta, weight, bias; one channel of x is zero throughout, as after a GELU it may nearly be."""
    generator = torch.Generator().manual_seed(0)
    shapes = (n, h, w, c), (1, 1, 1, c), (1, 1, 1, c), (out, c), (out,)
    x, *others = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    x[:, :, :, 1] = 0
    return x, *others


def plain_linear(x, gamma, beta, weight, bias):
    return F.linear(grn_plain(x, gamma, beta), weight, bias)


@pytest.mark.parametrize("size", SIZES, ids=["folded", "not folded"])
@pytest.mark.parametrize("form, plain", [(grn, grn_plain), (grn_linear, plain_linear)], ids=["grn", "grn_linear"])
def test_against_the_formula(form, plain, size):
    tensors = draw(*size)[:3 if form is grn else 5]
    tensors = [t.requires_grad_() for t in tensors]
    y, expected = form(*tensors), plain(*tensors)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    for found, wanted in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy),
                             strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=["folded", "not folded"])
@pytest.mark.parametrize("form", [grn, grn_linear])
def test_gradcheck(form, size):
    tensors = draw(*size)[:3 if form is grn else 5]
    tensors[0][:, :, :, 1] = 0.5  # a norm has no derivative at 0
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(form, tensors)
    assert torch.autograd.gradgradcheck(form, tensors)


@pytest.mark.parametrize("size", SIZES, ids=["folded", "not folded"])
def test_scaled_linear(size):
    x, gamma, _, weight, bias = draw(*size)
    scale = grn_scale(channel_norm(x), gamma)
    torch.testing.assert_close(scaled_linear(x, scale, weight, bias), F.linear(x * scale, weight, bias))


@pytest.mark.parametrize("size", SIZES, ids=["folded", "not folded"])
def test_in_16_bits_under_autocast(size):
    """The result comes in 16 bits and is as near as they allow; weights get gradients of 32."""
    tensors = [t.float() for t in draw(*size)]
    expected = plain_linear(*(t.double() for t in tensors))
    tensors = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = grn_linear(tensors[0].bfloat16(), *tensors[1:])
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 2e-2 * expected.norm()
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_norm_in_16_bits_adds_up_in_32():
    x = torch.full((1, 64, 64, 1), 0.01, dtype=torch.bfloat16)
    assert channel_norm(x).item() == pytest.approx(64 * x[0, 0, 0, 0].item(), rel=1e-5)
