"""Images of any size: CGSMM in windows (models/windows.py), and the network around it."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from timm.models._input import get_model_input_config

from config import load_config
from models import StripMLPNet, build_model, convert_released_state_dict, load_strict
from models.ablations import build_ablated
from models.strip_mlp import CGSMM
from models.windows import cut, merge
from tests.models.test_fidelity import FLOAT32, FLOAT64, load_figures, released_weights
from tests.nets import relative_error, tiny_net

# ---- cutting and merging -------------------------------------------------------------------------

def starts_of(side, length):
    """Where windows start."""
    if side <= length:
        return [0]
    n = round(side / length + 1 / 2)
    overlap = round((n * length - side) / (n - 1) - 1 / 2)
    return [min(i * (length - overlap), side - length) for i in range(n)]


def merged(windows, starts):
    """Windows along the last axis put together one after the other, halves where one overlaps what is there."""
    whole = windows[0]
    for window, start in zip(windows[1:], starts[1:], strict=True):
        overlap = whole.shape[-1] - start
        both = (whole[..., start:] + window[..., :overlap]) / 2
        whole = torch.cat([whole[..., :start], both, window[..., overlap:]], dim=-1)
    return whole


def random_sizes(count):
    rng = np.random.RandomState(0)
    lengths = [(int(rng.choice([1, 2, 3, 7, 14])), int(rng.choice([1, 2, 5, 7]))) for _ in range(count)]
    return [(length, tuple(map(int, rng.randint(1, 61, 2)))) for length in lengths]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cut_and_merge(memory_format):
    """On 40 random sizes, against the definition written out."""
    for (length_h, length_w), (height, width) in random_sizes(40):
        tops, lefts = starts_of(height, length_h), starts_of(width, length_w)
        x = torch.randn(2, 3, height, width, dtype=torch.float64).contiguous(memory_format=memory_format)
        padded = F.pad(x, (0, max(length_w - width, 0), 0, max(length_h - height, 0)))
        expected = [padded[:, :, i:i + length_h, j:j + length_w] for i in tops for j in lefts]
        windows = cut(x, (length_h, length_w))
        assert torch.equal(windows, torch.cat(expected))
        assert windows.is_contiguous(memory_format=memory_format) or height == width == 1
        windows = torch.randn_like(windows)
        grid = windows.reshape(len(tops), len(lefts), 2, 3, length_h, length_w)
        rows = [merged(list(row), lefts).mT for row in grid]
        whole = merge(windows, x.shape)
        torch.testing.assert_close(whole, merged(rows, tops).mT[:, :, :height, :width], rtol=1e-14, atol=1e-14)
        assert whole.is_contiguous(memory_format=memory_format) or length_h == length_w == 1


def test_a_map_of_the_trained_size_is_its_own_window():
    x = torch.randn(2, 3, 4, 6)
    assert cut(x, (4, 6)) is x
    assert merge(x, x.shape) is x


# ---- the released network ------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance, inputs", [
    (torch.float64, FLOAT64, [2, 4, 5]), (torch.float32, FLOAT32, [2]),
    pytest.param(torch.float64, FLOAT64, [0, 1, 3], marks=pytest.mark.slow),
    pytest.param(torch.float32, FLOAT32, [0, 1, 3, 4, 5], marks=pytest.mark.slow),
])
def test_fidelity(dtype, tolerance, inputs):
    """Every stage's output and the last one normalised; the column strips are spelt ``proh_w`` in this file."""
    figures = load_figures("windows_c80_224")
    net = StripMLPNet(num_classes=0, embed_dim=figures["embed_dim"], depths=figures["layers"],
                      num_patches=figures["num_patches"], dynamic_img_size=True).to(dtype).eval()
    load_strict(net, convert_released_state_dict(released_weights(figures)))
    for image in [figures["inputs"][i] for i in inputs]:
        shape = (image["images"], 3, image["height"], image["width"])
        x = torch.from_numpy(np.random.RandomState(image["image_seed"]).standard_normal(shape)).to(dtype)
        with torch.no_grad():
            features, outputs = net.forward_intermediates(x)
        for expected, found in zip(image["outputs"], [*outputs, features], strict=True):
            assert list(found.shape) == expected["shape"]
            found = found.double()
            samples = found.flatten()[torch.from_numpy(np.random.RandomState(7).randint(0, found.numel(), 48))]
            assert relative_error(samples, expected["samples"]) < tolerance
            assert relative_error(found.mean(), expected["mean"]) < tolerance
            assert relative_error(found.square().mean().sqrt(), expected["rms"]) < tolerance


# ---- the network ---------------------------------------------------------------------------------

def images(height, width, seed=1):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_the_same_network_at_the_trained_size():
    fixed, dynamic = tiny_net().eval(), tiny_net(dynamic_img_size=True).eval()
    assert fixed.state_dict().keys() == dynamic.state_dict().keys()
    assert torch.equal(fixed(images(32, 32)), dynamic(images(32, 32)))


def test_messages():
    with pytest.raises(ValueError, match=r"built for images of 32x32, .* \(2, 3, 33, 70\); .* \(valid near 33: 32 and "
                       r"64; valid near 70: 64 and 96\); .* any size with dynamic_img_size=True"):
        tiny_net()(images(33, 70))
    net = tiny_net(dynamic_img_size=True).eval()
    for x in (images(31, 64), images(64, 31), images(64, 64)[0]):
        with pytest.raises(ValueError, match="takes images .N, C, H, W. of at least 32x32 pixels, got a batch"):
            net(x)


@pytest.mark.parametrize("size", [(5, 7), (2, 9), (4, 3)])
def test_gradients(size):
    """Of the windowed CGSMM with respect to its input and to all that is learnt, against finite differences."""
    torch.manual_seed(0)
    cgsmm = CGSMM(2, (4, 3), 1).double().eval()
    parameters = dict(cgsmm.named_parameters())
    x = torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(cgsmm, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_autocast_keeps_16_bits():
    cgsmm = CGSMM(4, 4, 2).eval()
    x = torch.randn(2, 4, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = cgsmm(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), cgsmm(x), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_compiled_once_for_many_sizes():
    cgsmm = CGSMM(2, 4, 1).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(cgsmm, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in ((9, 13), (11, 14), (22, 30), (8, 12), (40, 17)):
            x = torch.randn(2, 2, *size)
            torch.testing.assert_close(compiled(x), cgsmm(x))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_onnx_at_a_fixed_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x = tiny_net(dynamic_img_size=True, depths=(1, 1, 1, 1)).eval(), images(50, 70)
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_symbolic_trace():
    """Forward, at several sizes, and backward."""
    net = tiny_net(dynamic_img_size=True).eval()
    traced = torch.fx.symbolic_trace(net)
    for size in ((32, 32), (50, 70)):
        torch.testing.assert_close(traced(images(*size)), net(images(*size)), rtol=0, atol=0)
    traced(images(32, 32)).sum().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_create_feature_extractor():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = tiny_net(drop_path_rate=0.0).eval()
    names = {f"stages.{stage}": str(stage) for stage in range(4)}
    extractor = feature_extraction.create_feature_extractor(net, names, suppress_diff_warning=True)
    expected = net.forward_intermediates(images(32, 32), intermediates_only=True)
    for found, output in zip(extractor(images(32, 32)).values(), expected, strict=True):
        assert torch.equal(found, output)
    sum(output.sum() for output in extractor.train()(images(32, 32)).values()).backward()
    assert all(p.grad is not None for key, p in extractor.named_parameters() if not key.startswith(("norm", "head")))


@pytest.mark.parametrize("build", [StripMLPNet, partial(build_ablated, "cgsmm", False, True)], ids=["net", "ablated"])
@torch.no_grad()
def test_set_input_size(build):
    """The network that is built for the new size and loads the weights, with the same parameter objects."""
    kwargs = {"num_classes": 5, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_patches": 2}
    net = build(img_size=32, **kwargs).double().eval()
    expected = build(img_size=(64, 96), **kwargs).double().eval()
    expected.load_state_dict(net.state_dict())
    parameters = list(net.parameters())
    net.set_input_size(img_size=(64, 96))
    assert net.img_size == (64, 96)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    x = images(64, 96).double()
    assert torch.equal(net(x), expected(x))
    with pytest.raises(ValueError, match="img_size 40 is not a multiple of 32"):
        net.set_input_size(img_size=40)
    assert torch.equal(net(x), expected(x))


def test_set_input_size_on_the_meta_device():
    """As timm's own tests call it: shapes, without values."""
    net = timm.create_model("strip_mlp_tiny", img_size=32, embed_dim=8, depths=(1, 1, 1, 1), device="meta")
    expected = StripMLPNet(img_size=64, embed_dim=8, depths=(1, 1, 1, 1))
    net.set_input_size(img_size=64)
    assert all(weight.is_meta for weight in net.state_dict().values())
    assert [w.shape for w in net.state_dict().values()] == [w.shape for w in expected.state_dict().values()]


def test_set_input_size_with_timm_s_helpers():
    net = timm.create_model("strip_mlp_tiny", img_size=32, embed_dim=8, depths=(1, 1, 1, 1), dynamic_img_size=True)
    net.set_input_size(img_size=64)
    assert get_model_input_config(net)["input_size"] == (3, 64, 64)
    assert net.eval()(images(70, 100)).shape == (2, 1000)


def test_in_a_config():
    config = load_config("", ["MODEL.NAME", "x", "DATA.IMG_SIZE", "48", "MODEL.STRIP_MLP.TRAINED_IMG_SIZE", "32",
                              "MODEL.STRIP_MLP.EMBED_DIM", "8", "MODEL.STRIP_MLP.DEPTHS", "[1, 1, 1, 1]"])
    net = build_model(config).eval()
    assert net.img_size == (32, 32)
    assert net(images(48, 48)).shape == (2, 1000)


def test_features_only():
    """A detector's backbone: strides 4 to 32, sides rounded down."""
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1)}
    backbone = timm.create_model("strip_mlp_tiny", features_only=True, dynamic_img_size=True, **sizes).eval()
    found = [tuple(output.shape) for output in backbone(images(75, 110))]
    assert found == [(2, 8, 18, 27), (2, 16, 9, 13), (2, 32, 4, 6), (2, 64, 2, 3)]
