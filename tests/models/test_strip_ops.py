"""The strip-mixing operator: the fast form against the formula, its gradients, and the released layout."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from models import strip_ops
from models.strip_ops import fuse, strip_mix, strip_mix_plain
from tests.nets import relative_error

AXES = ["row", "column"]
# Stages of the networks: C_in, side, P, images (odd on purpose), strip width.
STAGES = [
    (40, 56, 2, 1, 3), (56, 56, 4, 1, 3), (80, 28, 2, 3, 3), (48, 28, 4, 3, 3), (160, 14, 4, 3, 3), (320, 7, 4, 5, 3),
    (40, 14, 1, 3, 3), (40, 14, 1, 3, 1), (160, 14, 2, 1, 5), (96, 7, 4, 3, 1), (320, 7, 2, 5, 5),
]


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
    reference = naive(x, weight, bias, axis)
    for form in (strip_mix, strip_mix_plain):
        y = form(x, weight, bias, axis)
        assert y.shape == x.shape
        assert relative_error(y, reference) < 1e-12


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("c, side, p, n, width", STAGES)
def test_against_the_plain_form_on_the_stages(c, side, p, n, width, dtype, tolerance, axis):
    tensors = [t.requires_grad_() for t in draw(n, c, side, side, p, width, axis, dtype)]
    grad = torch.randn(n, c, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    results = []
    for form in (strip_mix, strip_mix_plain):
        y = form(*tensors, axis)
        results.append([y, *torch.autograd.grad(y, tensors, grad)])
    for name, value, reference in zip(("y", "x", "weight", "bias"), *results, strict=True):
        assert value.shape == reference.shape
        assert value.dtype == dtype
        assert relative_error(value, reference) < tolerance, name


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded", "flipped_strides"])
def test_layouts_of_the_input(layout, axis):
    """The result and the gradients do not depend on how the input lies in memory."""
    dense, weight, bias = draw(3, 8, 7, 7, 2, 3, axis)
    if layout == "channels_last":
        x = dense.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = dense.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        x = torch.cat([dense, dense.new_full(dense.shape, 9.0)], dim=1)[:, :8]  # as chunk makes it in the token mixing
    elif layout == "expanded":
        x = dense[:1].expand(3, -1, -1, -1)
    else:
        x = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not x.is_contiguous()
    values = []
    for given in (x, x.contiguous()):
        given = given.detach().requires_grad_()
        y = strip_mix(given, weight, bias, axis)
        y.sin().sum().backward()
        values.append((y, given.grad))
    for value, reference in zip(*values, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("n, c, h, w, p, width", [
    (2, 4, 3, 3, 2, 3), (1, 4, 2, 4, 1, 3), (1, 4, 3, 3, 4, 5), (1, 2, 3, 3, 2, 1),
])
def test_gradcheck(axis, n, c, h, w, p, width):
    tensors = [t.requires_grad_() for t in draw(n, c, h, w, p, width, axis)]
    for form in (strip_mix, strip_mix_plain):
        assert torch.autograd.gradcheck(lambda *args, form=form: form(*args, axis), tensors)
    assert torch.autograd.gradgradcheck(lambda *args: strip_mix(*args, axis), tensors)


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
    assert relative_error(strip_mix(x, weight, bias, axis), expected) < 1e-12


@pytest.mark.parametrize("axis", AXES)
def test_patches_share_weights_and_rows_are_alike(axis):
    """A patch (a row of the inside) that holds what another one holds gives what that one gives."""
    x, weight, bias = draw(1, 4, 6, 6, 2, 3, axis)
    x[:, 2:] = x[:, :2]
    y = strip_mix(x, weight, bias, axis)
    assert torch.equal(y[:, 2:], y[:, :2])
    assert not torch.allclose(y[:, 0], y[:, 1])
    shift = 2 if axis == "row" else 3
    x = torch.zeros_like(x)
    x.select(shift, 2).copy_(torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2), dtype=x.dtype))
    moved = x.roll(1, shift)
    y, y_moved = strip_mix(x, weight, bias, axis), strip_mix(moved, weight, bias, axis)
    torch.testing.assert_close(y.roll(1, shift), y_moved, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change, message", [
    ({"_IS_INTERPRETED": False}, "needs a CUDA GPU, and this is the device cpu; .*MODEL.STRIP_MLP.FORM auto"),
    ({"strip_triton": None}, "needs the package triton"),
    ({"_IS_INTERPRETED": True}, "at most 32 bits, and this is torch.float64"),
    ({"_IS_INTERPRETED": True, "_TRITON_DTYPES": (torch.float64,), "_TRITON_LONGEST": 2},
     "strips of at most 2 tokens, and these have 3"),
])
def test_where_triton_cannot_run_it_says_why(monkeypatch, change, message):
    for name, value in ({"strip_triton": object()} | change).items():
        monkeypatch.setattr(strip_ops, name, value)
    with pytest.raises(ValueError, match=message):
        strip_mix(*draw(1, 4, 3, 3, 2, 3, "row"), "row", "triton")


@pytest.mark.parametrize("axis", AXES)
def test_autocast(axis):
    """Under autocast it computes in bf16, and its gradients come back in the parameters' precision."""
    tensors = [t.requires_grad_() for t in draw(3, 8, 14, 14, 2, 3, axis, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = strip_mix(*tensors, axis)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sin().sum(), tensors)
    reference = strip_mix_plain(*tensors, axis)
    expected = torch.autograd.grad(reference.sin().sum(), tensors)
    assert relative_error(y, reference) < 1e-2
    for value, wanted in zip(grads, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, wanted) < 2e-2


@pytest.fixture
def float32_products():
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")  # the default, in the older and the newer setting


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has one setting")
@pytest.mark.parametrize("precision, expected", [("tf32", True), ("ieee", False)])
def test_tf32_is_read_where_the_newer_setting_was_used(float32_products, precision, expected):
    """``torch.backends.fp32_precision`` makes PyTorch's own ``allow_tf32`` raise; a compiled network reads it too."""
    float32_products.fp32_precision = precision
    assert strip_ops.allows_tf32() is expected
    compiled = torch.compile(lambda x: x + strip_ops.allows_tf32(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == expected


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_is_read_where_the_older_setting_was_used(float32_products, is_allowed):
    float32_products.allow_tf32 = is_allowed
    assert strip_ops.allows_tf32() is is_allowed


@pytest.mark.parametrize("capability, form", [((7, 5), "matmul"), ((8, 0), "triton")])
def test_triton_is_chosen_from_ampere_on(monkeypatch, capability, form):
    """On a tensor that only pretends to be on a GPU; a T4, 7.5, would take minutes to compile slow kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(strip_ops, "strip_triton", object())
    chosen = []
    for name in ("matmul", "triton"):
        monkeypatch.setattr(strip_ops, f"_{name}", lambda x, *args, name=name: chosen.append(name) or x)
    with FakeTensorMode():
        x = torch.empty(1, 4, 3, 3, device="cuda", dtype=torch.float16)
        strip_mix(x, torch.empty(2, 3, 3, 3, device="cuda"), None, "row")
    assert chosen == [form]


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("size", [(4, 5), (1, 2)], ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=3)), ids=str)
def test_fuse_against_the_convolution_of_the_concatenation(layouts, size, monkeypatch):
    """Whatever the layouts of the two maps and of the result that is asked for; on maps of many tokens and of few."""
    monkeypatch.setattr(strip_ops, "_IS_INTERPRETED", True)  # as on a GPU
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, *size, generator=generator, dtype=torch.float64) for c in (3, 2)]
    weight = torch.randn(6, 5, 1, 1, generator=generator, dtype=torch.float64)
    like = torch.zeros(2, 6, *size).contiguous(memory_format=layouts[2])
    tensors = [x.contiguous(memory_format=layout) for x, layout in zip(maps, layouts, strict=False)] + [weight]
    tensors = [t.requires_grad_() for t in tensors]
    y, expected = fuse(*tensors, like), F.conv2d(torch.cat(tensors[:2], dim=1), weight)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    if layouts[:2] == (torch.contiguous_format, torch.contiguous_format):
        assert y.is_contiguous(memory_format=layouts[2])
    assert torch.autograd.gradcheck(lambda *args: fuse(*args, like), tensors)
    assert torch.autograd.gradgradcheck(lambda *args: fuse(*args, like), tensors)
