"""Which strip layers run Triton's kernels, and where they give way to ``StripMLP.forward``."""

import copy
import inspect
import logging
import re
from types import SimpleNamespace

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from config import load_config
from models import build_model, fast
from models.fast import FastStripMLP, accelerate, make_plain, why_not
from models.strip_mlp import GRN, ChannelMixingBlock, StripMLP
from tests.helpers import DIGITS, TINY
from tests.models.test_strip_layer import layouts
from tests.nets import relative_error, tiny_net

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch):
    """The kernels are taken to run on the CPU too; a list that grows with each launch of the forward kernel."""
    calls, mix = [], fast.strip_triton.mix
    monkeypatch.setattr(fast, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(fast, "strip_triton", SimpleNamespace(mix=lambda *args: calls.append(args) or mix(*args)))
    return calls


@pytest.fixture
def forget():
    """What was found out about ``StripMLP.forward`` is forgotten, before and after."""
    fast._is_what_kernels_compute.cache_clear()
    yield
    fast._is_what_kernels_compute.cache_clear()


def kinds(net):
    return {type(module) for module in net.modules() if isinstance(module, StripMLP)}


def strip_layer(**kwargs):
    torch.manual_seed(0)
    return accelerate(StripMLP(4, 5, 2, "row", **kwargs))


def image(dtype=torch.float32):
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---- put in and taken out ------------------------------------------------------------------------

def test_the_network_of_a_config_and_of_timm():
    config = load_config(DIGITS, TINY)
    assert kinds(build_model(config)) == {FastStripMLP}
    assert kinds(build_model(load_config(DIGITS, [*TINY, "MODEL.STRIP_MLP.FAST", "False"]))) == {StripMLP}
    sizes = {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1)}
    for kwargs in ({}, {"features_only": True}, {"device": "meta"}):
        assert kinds(timm.create_model("strip_mlp_tiny", **sizes, **kwargs)) == {FastStripMLP}
    assert kinds(tiny_net()) == {StripMLP}


def test_it_is_the_same_network(launches):
    net, other = tiny_net(depths=(1, 1, 1, 1)).eval(), accelerate(tiny_net(depths=(1, 1, 1, 1))).eval()
    assert net.state_dict().keys() == other.state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    expected, found = ([net(images), *torch.autograd.grad(net(images).sum(), list(net.parameters()))]
                       for net in (net, other))
    assert len(launches) == 2 * 8  # two forward passes of eight layers
    assert relative_error(*(torch.cat([t.flatten() for t in ts]) for ts in (found, expected))) < 1e-4
    make_plain(other)
    assert kinds(other) == {StripMLP}
    assert torch.equal(other(images), expected[0])


def test_neither_a_subclass_nor_random_numbers_are_touched(forget):
    class Mine(StripMLP):
        pass

    state = torch.get_rng_state()
    net = torch.nn.Sequential(Mine(4, 5, 2, "row"), StripMLP(4, 5, 2, "row"))
    torch.set_rng_state(state)
    accelerate(net)
    assert [type(module) for module in net] == [Mine, FastStripMLP]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), FakeTensorMode])
def test_it_may_be_built_anywhere(context, forget, caplog):
    with context():
        assert type(strip_layer()) is FastStripMLP
    assert not caplog.records


# ---- an edited formula ---------------------------------------------------------------------------

EDITS = {
    "another result": lambda self, x: 2 * StripMLP.published(self, x),
    "another gradient": lambda self, x: StripMLP.published(self, x.detach() + 0 * x),
    "an error": lambda self, x: self.missing(x),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_formula_is_used_with_one_warning(edit, monkeypatch, forget, launches):
    warnings = []
    monkeypatch.setattr(logging.getLogger("strip_mlp.fast"), "warning", warnings.append)
    monkeypatch.setattr(StripMLP, "published", StripMLP.forward, raising=False)
    monkeypatch.setattr(StripMLP, "forward", EDITS[edit])
    layers = [strip_layer(), strip_layer()]
    assert [type(layer) for layer in layers] == [StripMLP] * 2
    assert len(warnings) == 1 and "StripMLP.forward was changed (" in warnings[0]
    if edit != "an error":
        layers[0](image())
    assert not launches


def test_a_formula_that_is_edited_later_is_used(monkeypatch, launches):
    layer, published = strip_layer(), StripMLP.forward
    expected = 2 * published(layer, image())
    monkeypatch.setattr(StripMLP, "forward", lambda self, x: 2 * published(self, x))
    assert torch.equal(layer(image()), expected)
    layer.forward = lambda x: 3 * x  # of one layer alone
    assert torch.equal(layer(image()), 3 * image())
    assert not launches


@pytest.mark.parametrize("kind", [GRN, ChannelMixingBlock])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_other_formula_is_used_as_it_is(kind, compiled, monkeypatch):
    """It changes the outputs and trains, also compiled."""
    torch._dynamo.reset()
    net, images = accelerate(tiny_net(depths=(1, 1, 1, 1), drop_path_rate=0.0)), torch.randn(2, 3, 32, 32)
    before, published = net(images), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: published(self, x) * self.extra)
    for module in net.modules():
        if isinstance(module, kind):
            module.extra = torch.nn.Parameter(torch.tensor(1.5))
    call = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    y = call(images)
    assert relative_error(y, before) > 1e-3
    y.square().sum().backward()
    assert all(module.extra.grad.abs() > 0 for module in net.modules() if isinstance(module, kind))


# ---- where the kernels apply ---------------------------------------------------------------------

def run_in_jit_trace(layer, x):
    torch.jit.trace(layer, x, check_trace=False)


def run_forward_mode(layer, x):
    with forward_ad.dual_level():
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


def run_with_a_tensor_subclass(layer, x):
    class Other(torch.Tensor):
        pass

    layer = copy.deepcopy(layer)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Other))
    layer(x)


PLAIN = {
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None]),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "forward mode": run_forward_mode,
    "jit.trace": run_in_jit_trace,
    "float64": lambda layer, x: copy.deepcopy(layer).double()(x.double()),
    "a tensor subclass": run_with_a_tensor_subclass,
    "long strips": lambda layer, x: StripMLP.__call__(accelerate(StripMLP(2, 65, 1, "row")), torch.zeros(1, 2, 1, 65)),
    "a long other side": lambda layer, x: accelerate(StripMLP(2, 3, 1, "row"))(torch.zeros(1, 2, 130, 3)),
}
FAST = {
    "float32": lambda layer, x: layer(x),
    "16 bits": lambda layer, x: copy.deepcopy(layer).half()(x.half()),
    "channels last": lambda layer, x: layer(x.contiguous(memory_format=torch.channels_last)),
    "functional call": lambda layer, x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)),
    "longer strips in 16 bits": lambda layer, x: accelerate(StripMLP(2, 65, 1, "row")).half()(
        torch.zeros(1, 2, 1, 65).half()),
}


@pytest.mark.parametrize("name", [*PLAIN, *FAST])
def test_where_the_kernels_apply(name, launches):
    (PLAIN | FAST)[name](strip_layer(), image())
    assert len(launches) == (name in FAST)


def test_not_on_the_cpu():
    assert fast.DEVICES == ("cuda",)


@pytest.mark.parametrize("capability, dtype, tf32, applies", [
    ((7, 5), torch.float16, True, False), ((8, 0), torch.float16, False, True), ((9, 0), torch.bfloat16, False, True),
    ((9, 0), torch.float32, False, False), ((9, 0), torch.float32, True, True),
])
def test_on_which_gpus(capability, dtype, tf32, applies, monkeypatch):
    """On a tensor that only pretends to be on the second GPU; a T4, 7.5, would take minutes to compile slow kernels."""
    asked, calls = [], []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: asked.append(device) or capability)
    monkeypatch.setattr(fast, "_allows_tf32", lambda: tf32)
    monkeypatch.setattr(fast, "strip_triton", SimpleNamespace(mix=lambda x, *args: calls.append(1) or x))
    with FakeTensorMode(), torch.device("cuda:1"):
        layer = accelerate(StripMLP(4, 5, 2, "row"))
        x = torch.empty(2, 4, 5, 5, dtype=dtype)
        assert layer(x if applies else x.float()).shape == x.shape
        assert fast.uses_kernels(layer, torch.device("cuda", 1), dtype) is applies
    assert set(asked) == {1}
    assert len(calls) == applies


@pytest.fixture
def float32_products():
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")  # the default, in the older and the newer setting


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has one setting")
@pytest.mark.parametrize("precision, expected", [("tf32", True), ("ieee", False)])
def test_tf32_by_the_newer_setting(float32_products, precision, expected, monkeypatch):
    """``torch.backends.fp32_precision`` makes PyTorch's own ``allow_tf32`` raise; a compiled network reads it too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    float32_products.fp32_precision = precision
    compiled = torch.compile(lambda x: x + fast._has_tensor_cores(0, torch.float32), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())) == expected


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_by_the_older_setting(float32_products, is_allowed):
    float32_products.allow_tf32 = is_allowed
    assert fast._allows_tf32() is is_allowed


@pytest.mark.parametrize("shape", [(2, 4, 5, 5), (1, 4, 1, 5), (1, 2, 5, 5)], ids=str)
def test_the_kernels_receive_contiguous_maps(shape, launches):
    """Whatever the layout of the input."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for name, given in [*layouts(x), ("expanded", x[:, :1].expand_as(x))]:
        strip_layer()(given)
        received = launches.pop()[0]
        assert received.is_contiguous() and torch.equal(received, given), name


def test_autocast(launches):
    """The kernels compute in 16 bits, and the gradients come back in the parameters' precision."""
    layer, x = strip_layer(), image().requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16 and len(launches) == 1
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, layer.weight, layer.bias)} == {torch.float32}
    assert relative_error(y.float(), StripMLP.forward(layer, x)) < 1e-2


def test_compiles_without_a_graph_break(launches):
    torch._dynamo.reset()
    layer, x = strip_layer(), image().requires_grad_()
    results = [torch.autograd.grad(call(x).sin().sum(), (x, layer.weight, layer.bias))
               for call in (torch.compile(layer, backend="aot_eager", fullgraph=True), layer)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


# ---- the probe -----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_probe_passes_where_the_kernels_work(dtype):
    assert why_not(torch.device("cuda") if torch.cuda.is_available() else CPU, dtype) == ""


@pytest.mark.parametrize("wrong", ["result", "gradient of x", "gradient of the weight", "gradient of the bias"])
@pytest.mark.parametrize("wrong_axis", ["row", "column"])
def test_the_probe_finds_wrong_results(wrong, wrong_axis, monkeypatch):
    mix = fast.strip_triton.mix

    def wrong_mix(x, weight, bias, axis):
        leaves = {"gradient of x": x, "gradient of the weight": weight, "gradient of the bias": bias}
        if axis == wrong_axis and wrong in leaves:
            leaves[wrong].register_hook(lambda grad: grad * 1.2)
        return mix(x, weight, bias, axis) * (1.2 if wrong == "result" and axis == wrong_axis else 1.0)

    smallest_blocks = fast.strip_triton.smallest_blocks
    monkeypatch.setattr(fast, "strip_triton", SimpleNamespace(mix=wrong_mix, smallest_blocks=smallest_blocks))
    assert f"its {wrong} along a {wrong_axis} differs from the formula's by" in why_not(CPU, torch.float32)


def build_with_triton():
    """Triton's own search for a C compiler, as at a first launch."""
    from triton.runtime.build import _build

    _build(*["probe"] * len(inspect.signature(_build).parameters))


def store_in_triton_cache():
    """Triton's own writing of a compiled kernel, as at a first launch."""
    from triton.runtime.cache import get_cache_manager

    get_cache_manager("0" * 64).put(b"", "probe.o")


@pytest.mark.parametrize("launch, message", [
    (build_with_triton, "C compiler|AssertionError"),
    (store_in_triton_cache, "NotADirectoryError.*a file.*TRITON_CACHE_DIR"),
])
def test_the_probe_says_why_triton_cannot_compile(monkeypatch, tmp_path, launch, message):
    """Without a C compiler, as in slim containers, and with a cache that cannot be written."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # Triton 3.2 imports it, as pytest has already
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a file" / "cache"))
    blocks = fast.strip_triton.smallest_blocks
    monkeypatch.setattr(fast, "strip_triton", SimpleNamespace(mix=lambda *args: launch(), smallest_blocks=blocks))
    reason = why_not(CPU, torch.float32)
    assert re.search(message, reason) and len(reason.splitlines()) == 1
