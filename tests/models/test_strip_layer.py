"""The strip layer: the formula number by number, on the networks' stages, its gradients, and the released layout."""

import pytest
import torch
import torch.nn.functional as F

from models.strip_mlp import StripMLP
from tests.nets import relative_error

AXES = ["row", "column"]
# Stages of the networks: C_in, side, P, images (odd on purpose), strip width.
STAGES = [
    (40, 56, 2, 1, 3), (56, 56, 4, 1, 3), (80, 28, 2, 3, 3), (48, 28, 4, 3, 3), (160, 14, 4, 3, 3), (320, 7, 4, 5, 3),
    (40, 14, 1, 3, 3), (40, 14, 1, 3, 1), (160, 14, 2, 1, 5), (96, 7, 4, 3, 1), (320, 7, 2, 5, 5),
]


def strip(x, weight, bias, axis, kind=StripMLP):
    """A strip layer of these weights, as a function of them."""
    d, length, _, k = weight.shape
    layer = kind(d, length, 1, axis, k)
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


class Reference(StripMLP):
    """The docstring's formula as one sum of products."""

    def forward(self, x):
        x = x if self.axis == "row" else x.mT
        d, _, _, k = self.weight.shape
        x = F.pad(x.unflatten(1, (-1, d)), (0, 0, k // 2, k // 2)).unfold(3, k, 1)  # (N, P, D, H, L, K)
        y = (torch.einsum("npdhik,djik->npdhj", x, self.weight) + self.bias[:, None]).flatten(1, 2)
        return y if self.axis == "row" else y.mT


def reference(x, weight, bias, axis):
    return strip(x, weight, bias, axis, Reference)


def draw(n, c, h, w, p, width, axis, dtype=torch.float64, seed=0):
    """x, weight and bias; the weight is scaled so that outputs are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    length = w if axis == "row" else h
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    weight = torch.randn(c // p, length, length, width, generator=generator, dtype=torch.float64)
    weight /= (length * width) ** 0.5
    bias = torch.randn(c // p, length, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def naive(x, weight, bias, axis):
    """The two formulas of the strip layers, number by number."""
    channels_per_patch, length, _, width = weight.shape
    images, channels, height, breadth = x.shape
    y = torch.zeros_like(x)
    for n in range(images):
        for c in range(channels):
            d = c % channels_per_patch  # c = p * D + d
            for a in range(height if axis == "row" else breadth):  # the row (column) that is computed
                for j in range(length):
                    total = bias[d, j].item()
                    for k in range(width):
                        b = a + k - width // 2  # the row (column) that is read
                        if not 0 <= b < (height if axis == "row" else breadth):
                            continue
                        for i in range(length):
                            value = x[n, c, b, i] if axis == "row" else x[n, c, i, b]
                            total += weight[d, j, i, k].item() * value.item()
                    if axis == "row":
                        y[n, c, a, j] = total
                    else:
                        y[n, c, j, a] = total
    return y


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("n, c, h, w, p, width", [
    (2, 4, 3, 3, 2, 3), (1, 6, 4, 4, 1, 3), (1, 8, 2, 2, 4, 3), (1, 4, 5, 5, 2, 5), (2, 2, 3, 3, 1, 1),
    (1, 4, 1, 1, 2, 3), (1, 4, 3, 5, 2, 3), (1, 2, 5, 3, 1, 3), (1, 2, 2, 2, 2, 5),
])
def test_against_the_formula(axis, n, c, h, w, p, width):
    x, weight, bias = draw(n, c, h, w, p, width, axis)
    expected = naive(x, weight, bias, axis)
    for compute in (strip, reference):
        y = compute(x, weight, bias, axis)
        assert y.shape == x.shape
        assert relative_error(y, expected) < 1e-12


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("c, side, p, n, width", STAGES)
def test_on_the_stages(c, side, p, n, width, dtype, tolerance, axis):
    tensors = [t.requires_grad_() for t in draw(n, c, side, side, p, width, axis, dtype)]
    grad = torch.randn(n, c, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    results = []
    for compute in (strip, reference):
        y = compute(*tensors, axis)
        results.append([y, *torch.autograd.grad(y, tensors, grad)])
    for name, value, expected in zip(("y", "x", "weight", "bias"), *results, strict=True):
        assert value.shape == expected.shape
        assert value.dtype == dtype
        assert relative_error(value, expected) < tolerance, name


def layouts(x):
    """The same numbers, (N, C, H, W), in other memory layouts: dense in all orders, slices, steps, shifted."""
    n, c, h, w = x.shape
    yield "channels last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.mT.contiguous().mT
    yield "reversed strides", x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for dim in range(4):
        wide = torch.cat([x.new_full(x.shape, 9.0), x, x.new_full(x.shape, 9.0)], dim)
        yield f"slice of axis {dim}", wide.narrow(dim, x.shape[dim], x.shape[dim])
        steps = x.new_full([2 * side if i == dim else side for i, side in enumerate(x.shape)], 9.0)
        steps[(slice(None),) * dim + (slice(None, None, 2),)] = x
        yield f"steps along axis {dim}", steps[(slice(None),) * dim + (slice(None, None, 2),)]
    channels_last = torch.cat([x, x.new_full(x.shape, 9.0)], 1).contiguous(memory_format=torch.channels_last)
    yield "half of a channels-last map", channels_last[:, :c]  # as the token mixing cuts it
    yield "shifted", torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, c, h, w)


def check_layouts(compute, shape, axis, dtype=torch.float64, device="cpu", tolerance=1e-13):
    """The result and the gradients do not depend on the memory layouts of the input and of the output's gradient."""
    x, weight, bias = (t.to(device) for t in draw(*shape, 2, 3, axis, dtype))
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device, dtype)
    cases = [(name, other, dy) for name, other in layouts(x)] + [(name, x, other) for name, other in layouts(dy)]
    cases += [("expanded", x[:1].expand_as(x), dy[:, :, :1].expand_as(dy)),
              ("expanded", x[:, :, :, :1].expand_as(x), dy[:, :1, :1, :1].expand_as(dy))]
    for name, given, grad in cases:
        values = []
        for case in ((given, grad), (given.contiguous(), grad.contiguous())):
            tensors = [t.detach().requires_grad_() for t in (case[0], weight, bias)]
            y = compute(*tensors, axis)
            values.append((y, *torch.autograd.grad(y, tensors, case[1])))
        for value, expected in zip(*values, strict=True):
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(3, 8, 7, 7), (1, 4, 5, 3), (2, 2, 1, 4), (1, 2, 3, 1), (2, 4, 1, 1)], ids=str)
def test_layouts(shape, axis):
    check_layouts(strip, shape, axis)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("n, c, h, w, p, width", [
    (2, 4, 3, 3, 2, 3), (1, 4, 2, 4, 1, 3), (1, 4, 3, 3, 4, 5), (1, 2, 3, 3, 2, 1),
])
def test_gradcheck(axis, n, c, h, w, p, width):
    tensors = [t.requires_grad_() for t in draw(n, c, h, w, p, width, axis)]
    for compute in (strip, reference):
        assert torch.autograd.gradcheck(lambda *args, compute=compute: compute(*args, axis), tensors)
    assert torch.autograd.gradgradcheck(lambda *args: strip(*args, axis), tensors)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("c, side, p", [(8, 5, 2), (12, 7, 1), (8, 4, 4)])
def test_against_the_released_grouped_convolution(c, side, p, axis):
    """The released layer: permuted copies of the patches, their D * L channels and tokens convolved in D groups."""
    x, weight, bias = draw(3, c, side, side, p, 3, axis)
    d = c // p
    released_weight, released_bias = weight.reshape(d * side, side, 1, 3), bias.reshape(d * side)
    patches = x.reshape(3 * p, d, side, side)  # (N*P, D, H, W)
    if axis == "row":  # (N*P, D, H, W) -> (N*P, D*W, 1, H), convolved along H
        stacked = patches.permute(0, 1, 3, 2).reshape(3 * p, d * side, 1, side)
        y = F.conv2d(stacked, released_weight, released_bias, padding=(0, 1), groups=d)
        expected = y.reshape(3 * p, d, side, side).permute(0, 1, 3, 2).reshape(3, c, side, side)
    else:  # (N*P, D, H, W) -> (N*P, D*H, 1, W), convolved along W
        stacked = patches.reshape(3 * p, d * side, 1, side)
        y = F.conv2d(stacked, released_weight, released_bias, padding=(0, 1), groups=d)
        expected = y.reshape(3, c, side, side)
    assert relative_error(strip(x, weight, bias, axis), expected) < 1e-12


@pytest.mark.parametrize("axis", AXES)
def test_patches_share_weights_and_rows_are_alike(axis):
    """A patch (a row of the inside) that holds what another one holds gives what that one gives."""
    x, weight, bias = draw(1, 4, 6, 6, 2, 3, axis)
    x[:, 2:] = x[:, :2]
    y = strip(x, weight, bias, axis)
    assert torch.equal(y[:, 2:], y[:, :2])
    assert not torch.allclose(y[:, 0], y[:, 1])
    shift = 2 if axis == "row" else 3
    x = torch.zeros_like(x)
    x.select(shift, 2).copy_(torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2), dtype=x.dtype))
    moved = x.roll(1, shift)
    y, y_moved = strip(x, weight, bias, axis), strip(moved, weight, bias, axis)
    torch.testing.assert_close(y.roll(1, shift), y_moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_autocast(axis):
    """Under autocast it computes in bf16, and its gradients come back in the parameters' precision."""
    tensors = [t.requires_grad_() for t in draw(3, 8, 14, 14, 2, 3, axis, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = strip(*tensors, axis)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sin().sum(), tensors)
    exact = reference(*tensors, axis)
    expected = torch.autograd.grad(exact.sin().sum(), tensors)
    assert relative_error(y, exact) < 1e-2
    for value, wanted in zip(grads, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, wanted) < 2e-2
