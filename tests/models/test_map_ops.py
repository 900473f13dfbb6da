"""The kernels that join passes over maps, on the GPU or in Triton's interpreter, against the plain forms."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import count_batches_once, strip_ops
from models.map_ops import norm_gelu, project, weigh_branches
from models.mlp_ops import mlp
from models.strip_mlp import GRN, LSMM, Block, StripMLP
from tests.nets import draw, randomise, relative_error

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [(torch.float32, 2e-5), (torch.float16, 4e-3)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SIZES = [(2, 10, 5, 7), (1, 2, 20, 15)]  # N, C, H, W: less than a block, and more than one part of the tokens


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    from models import map_triton

    monkeypatch.setattr(map_triton, "PART", 256)


def compare(call, module, x, dtype, tolerance):
    """Results, gradients, and buffers of ``call(form, module, x)`` by kernels in a type, against float64."""
    found, expected = [], []
    for values, form, of in ((found, "triton", dtype), (expected, "plain", torch.float64)):
        net = copy.deepcopy(module).to(DEVICE, torch.float64 if of == torch.float64 else torch.float32)
        images = x.to(DEVICE, dtype).to(of).requires_grad_()
        with torch.autocast(DEVICE, dtype, enabled=of == torch.float16):
            y = call(form, net, images)
        y = y if isinstance(y, tuple) else (y,)
        grads = [draw(*part.shape, seed=7 + i).to(DEVICE, part.dtype) for i, part in enumerate(y)]
        parameters = dict(net.named_parameters())
        d = torch.autograd.grad(y, [images, *parameters.values()], grads, allow_unused=True)
        values += zip([f"y{i}" for i in range(len(y))], y, strict=True)
        values += zip(["dx", *parameters], d, strict=True)
        values += [(name, buffer) for name, buffer in net.named_buffers() if buffer.is_floating_point()]
    for (name, value), (_, reference) in zip(found, expected, strict=True):
        if name in ("y0", "dx"):
            assert value.dtype == dtype
        if reference is None or reference.norm() < 1e-9:  # the gradient of a bias that a norm takes away again
            assert value is None or value.norm() < 1e-3, name
        else:
            assert relative_error(value, reference) < tolerance, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_norm_gelu(size, dtype, tolerance, layout):
    x = (draw(*size) + 3).contiguous(memory_format=layout)
    norm = randomise(nn.BatchNorm2d(size[1])).train()
    compare(lambda form, norm, x: norm_gelu(x, norm, form), norm, x, dtype, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_project(size, dtype, tolerance):
    x = draw(*size).contiguous(memory_format=torch.channels_last)
    layers = randomise(nn.Sequential(nn.Conv2d(size[1], 2 * size[1], 1), nn.BatchNorm2d(2 * size[1]))).train()
    compare(lambda form, layers, x: project(x, *layers, form), layers, x, dtype, tolerance)
    first, second = project(x.to(DEVICE, torch.float32), *layers.to(DEVICE, torch.float32), "triton")
    assert first.is_contiguous() and second.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype, tolerance", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weigh_branches(size, dtype, tolerance, layout):
    x = draw(*size).contiguous(memory_format=layout)
    lsmm = randomise(LSMM(size[1]))

    def call(form, lsmm, x):
        return weigh_branches(2 * x, x.sin().contiguous(memory_format=layout), x, lsmm.weigh, form)

    for conv in (lsmm.row_conv, lsmm.column_conv):
        conv.requires_grad_(False)
    del lsmm.row_conv, lsmm.column_conv
    compare(call, lsmm, x, dtype, tolerance)


@pytest.mark.parametrize("dtype, tolerance", TYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 5, 4), (1, 20, 15, 2), (2, 2, 3, 3)], ids=str)  # N, H, W, C
def test_mlp(size, dtype, tolerance):
    """With more tokens than channels in the hidden map, and with fewer."""
    c = size[-1]
    layers = randomise(nn.ModuleDict({"fc1": nn.Linear(c, 3 * c), "grn": GRN(3 * c), "fc2": nn.Linear(3 * c, c)}))
    compare(lambda form, layers, x: mlp(x, *layers.values(), form), layers, draw(*size), dtype, tolerance)


def test_replaced_layers_and_hooks_take_part():
    """An adapter in the place of a block's first linear layer, and a hook on it, wherever kernels do not run."""
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = randomise(nn.ModuleDict({"fc1": Doubled(4, 12), "grn": GRN(12), "fc2": nn.Linear(12, 4)}))
    layers.to(DEVICE, torch.float32)
    x, seen = draw(2, 3, 3, 4).to(DEVICE).float(), []
    layers.fc1.register_forward_hook(lambda *args: seen.append(args))
    expected = layers.fc2(layers.grn(nn.functional.gelu(layers.fc1(x))))
    for form in ("triton", "plain"):
        assert relative_error(mlp(x, *layers.values(), form), expected) < 1e-5
    assert len(seen) == 3


def test_a_recomputed_block():
    """By kernels, as gradient checkpointing runs it: gradients, and running statistics that count the batch once."""
    results = []
    for form in ("triton", "matmul"):
        torch.manual_seed(0)
        block = Block(4, (5, 4), 1, 3, 1.0, drop_path=0.0).to(DEVICE, memory_format=torch.channels_last)
        count_batches_once(block)
        modules = [module for module in block.modules() if hasattr(module, "form")]
        assert len(modules) == 6 and sum(isinstance(module, StripMLP) for module in modules) == 2
        for module in modules:
            module.form = form
        x = draw(2, 4, 5, 4).float().to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if form == "triton" else block(x)
        y.backward(draw(2, 4, 5, 4, seed=3).to(y))
        grads = torch.cat([p.grad.flatten() for p in block.parameters()])
        results.append([y, x.grad, grads, *block.buffers()])
    for value, reference in zip(*results, strict=True):
        assert relative_error(value, reference) < 1e-4


def test_a_norm_over_several_processes_is_left_to_pytorch(monkeypatch):
    norm, x = nn.SyncBatchNorm(4).to(DEVICE), torch.ones(2, 4, 3, 3, device=DEVICE)
    monkeypatch.setattr(norm, "forward", lambda x: 2 * x)
    assert torch.equal(norm_gelu(x, norm, "triton"), nn.functional.gelu(2 * x))
    assert strip_ops.uses_kernels(x, "triton")
