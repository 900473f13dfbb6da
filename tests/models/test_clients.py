"""What others do to a network's parts takes effect: adapters, hooks, pruning, quantisation, replaced parts, transforms.
"""

import copy
import json
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import models
from models.strip_mlp import CGSMM, GRN, RelativePosition, StripMLP
from tests.nets import relative_error, tiny_net
from tests.processes import ROOT, Fork

BLOCK = "stages.1.0"
PARTS = {  # linear layers, by what a user calls them
    "fc1": f"{BLOCK}.channel_mixing.fc1", "fc2": f"{BLOCK}.channel_mixing.fc2",
    "row_fuse": f"{BLOCK}.token_mixing.cgsmm.row_fuse", "column_fuse": f"{BLOCK}.token_mixing.cgsmm.column_fuse",
    "proj_in": f"{BLOCK}.token_mixing.proj_in", "proj_out": f"{BLOCK}.token_mixing.proj_out", "stem": "stem",
}
each_part = pytest.mark.parametrize("part", PARTS)


@pytest.fixture
def net():
    """A network of four blocks without drop path, whose GRN is not the identity."""
    net = tiny_net(depths=(1, 1, 1, 1), drop_path_rate=0.0)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, GRN):
            module.gamma.data.copy_(torch.randn(module.gamma.shape, generator=generator))
    return net


def images(count=2, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def replace(net, name, part):
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, part)


# ---- peft ----------------------------------------------------------------------------------------

@each_part
def test_lora(net, part):
    """It changes the outputs, alone has gradients, and gives the same in train and eval mode as merged."""
    peft = pytest.importorskip("peft")
    expected = net.eval()(images())
    adapted = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, target_modules=[PARTS[part]])).eval()
    assert torch.equal(adapted(images()), expected)  # LoRA begins with zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    changed = adapted(images())
    assert relative_error(changed, expected) > 1e-3
    adapted.train()
    for norm in adapted.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    trained = adapted(images())
    torch.testing.assert_close(trained, changed)
    trained.square().sum().backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()} == {
        name for name, _ in adapted.named_parameters() if "lora_" in name}
    torch.testing.assert_close(adapted.merge_and_unload().eval()(images()), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, layers, kwargs", [
    ("smlpnet_tiny", ["proj_h", "proh_w", "fuse", "net.0"], {"img_size": 32, "embed_dim": 8, "depths": (1, 1, 1, 1)}),
    ("wave_mlp_base", ["fc_h", "theta_h_conv.0", "attn.proj"], {"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}),
])
def test_lora_on_the_baselines(name, layers, kwargs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **kwargs).eval()
    expected = net(images())
    for layer in layers:
        adapted = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(r=2, target_modules=[layer])).eval()
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter)
        changed = adapted(images())
        assert relative_error(changed, expected) > 1e-3, layer
        torch.testing.assert_close(adapted.merge_and_unload()(images()), changed, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter(net, tmp_path):
    """It holds no statistics of BatchNorms, which set_train_mode therefore keeps."""
    peft = pytest.importorskip("peft")
    base = copy.deepcopy(net)
    config = peft.LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["row_strip", "head"])
    adapted = peft.get_peft_model(net, config)
    models.set_train_mode(adapted)
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted(images()).square().sum().backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path)
    expected = adapted.eval()(images())
    assert relative_error(expected, base.eval()(images())) > 1e-3
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path).eval()(images()), expected)


# ---- hooks and counters --------------------------------------------------------------------------

def test_hooks_fire_in_every_module(net):
    forward, backward = set(), set()
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList):  # is not called, as in any network
            continue
        module.register_forward_hook(lambda *args, name=name: forward.add(name))
        module.register_full_backward_hook(lambda *args, name=name: backward.add(name))
    net(images()).sum().backward()
    expected = {name for name, module in net.named_modules() if not isinstance(module, nn.ModuleList)}
    assert forward == expected
    assert backward == expected


def test_a_counter_by_hooks_sees_all_multiply_accumulates(net):
    macs = []

    def count(module, inputs, output):
        if isinstance(module, StripMLP):
            macs.append(output.numel() * module.weight[0, 0].numel())
        else:
            macs.append(output.numel() * module.weight[0].numel())

    for module in net.modules():
        if isinstance(module, (StripMLP, nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(images(1))
    assert 2 * sum(macs) == counter.get_total_flops()


def test_a_hook_may_change_an_output(net):
    expected = net.eval()(images())
    net.get_submodule(PARTS["fc2"]).register_forward_hook(lambda module, inputs, output: 2 * output)
    assert relative_error(net(images()), expected) > 1e-3


# ---- pruning, parametrisations, quantisation -----------------------------------------------------

@each_part
def test_pruning(net, part):
    """Two backward passes; what was pruned stays zero and gets no gradient."""
    layer = net.get_submodule(PARTS[part])
    expected = net.eval()(images())
    prune.l1_unstructured(layer, "weight", amount=0.5)
    for _ in range(2):
        y = net.train()(images())
        y.square().sum().backward()
    assert relative_error(net.eval()(images()), expected) > 1e-3
    kept = layer.weight_mask.bool()
    assert not layer.weight_orig.grad[~kept].any() and layer.weight_orig.grad[kept].any()


@pytest.mark.parametrize("name", [f"{BLOCK}.token_mixing.cgsmm.row_strip", PARTS["fc2"], PARTS["proj_out"]])
def test_parametrisations(net, name):
    expected = net.eval()(images())
    parametrizations.weight_norm(net.get_submodule(name))
    torch.testing.assert_close(net(images()), expected, rtol=1e-4, atol=1e-4)
    gain = net.get_submodule(name).parametrizations.weight.original0
    gain.data *= 2
    y = net(images())
    assert relative_error(y, expected) > 1e-4
    y.sum().backward()
    assert gain.grad.any()


def test_dynamic_quantisation(net):
    expected = net.eval()(images())
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear}, dtype=torch.qint8)
    assert "DynamicQuantizedLinear" in str(quantised.get_submodule(PARTS["fc2"]))
    assert 0 < relative_error(quantised(images()), expected) < 0.1


def test_weight_only_quantisation(net):
    quantization = pytest.importorskip("torchao.quantization")
    expected = net.eval()(images())
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    assert 0 < relative_error(net(images()), expected) < 0.1


# ---- replaced parts ------------------------------------------------------------------------------

def test_identity_in_place_of_parts(net):
    other = copy.deepcopy(net).eval()
    for name, module in net.named_modules():
        if isinstance(module, GRN):
            replace(other, name, nn.Identity())
        if isinstance(module, CGSMM):
            replace(other, f"{name}.row_position", nn.Identity())
            replace(other, f"{name}.column_position", nn.Identity())
    for module in net.modules():  # the same by weights of zero
        if isinstance(module, (GRN, RelativePosition)):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)
    torch.testing.assert_close(other(images()), net.eval()(images()), rtol=1e-5, atol=1e-5)


def test_a_sequence_in_place_of_a_part(net):
    expected = net.eval()(images())
    layer = net.get_submodule(PARTS["proj_out"])
    replace(net, PARTS["proj_out"], nn.Sequential(layer, nn.Identity()))
    assert torch.equal(net(images()), expected)
    replace(net, PARTS["proj_out"], nn.Sequential(layer, nn.ReLU()))
    assert relative_error(net(images()), expected) > 1e-3


# ---- torch.func, tracing -------------------------------------------------------------------------

def test_torch_func(net):
    """grad and its vmap, gradients of each image by itself; jvp against a finite difference."""
    net = net.double().eval()
    x, weights = images().double(), {name: p.detach() for name, p in net.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(net, weights, (image[None],)).square().sum()

    whole = torch.func.grad(lambda weights: sum(loss(weights, image) for image in x))(weights)
    by_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(by_image[name].sum(0), parameter.grad, rtol=1e-8, atol=1e-10)
    step = torch.randn_like(x)
    y, slope = torch.func.jvp(net, (x,), (step,))
    torch.testing.assert_close(y, net(x))
    assert relative_error(slope, (net(x + 1e-6 * step) - net(x - 1e-6 * step)) / 2e-6) < 1e-6


def test_gradients_by_image_in_windows():
    """vmap of a network for 32x32 images on larger ones, in the layout of each block's output."""
    net = tiny_net(depths=(1, 1, 1, 1), drop_path_rate=0.0, dynamic_img_size=True).double().eval()
    weights, x = {name: p.detach() for name, p in net.named_parameters()}, images(side=48).double()

    def loss(weights, image):
        return torch.func.functional_call(net, weights, (image[None],)).square().sum()

    by_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(by_image[name].sum(0), parameter.grad, rtol=1e-8, atol=1e-10)


def test_jit_trace_and_save(net, tmp_path):
    expected = net.eval()(images())
    torch.jit.trace(net, images(), check_trace=False).save(tmp_path / "net.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(images()), expected)


def test_jit_trace_in_windows():
    """For any batch at the traced image size; another size is an error, not a wrong result."""
    net = tiny_net(depths=(1, 1, 1, 1), dynamic_img_size=True).eval()
    traced = torch.jit.trace(net, images(side=48), check_trace=False)
    torch.testing.assert_close(traced(images(3, side=48)), net(images(3, side=48)))
    for side in (32, 40, 64):
        with pytest.raises(RuntimeError, match="out of range|must match"):
            traced(images(side=side))


def test_onnx_by_torchscript(tmp_path):
    """PyTorch's older exporter, with a batch of another size than the example's."""
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = StripMLP(4, 3, 2, "column"), torch.randn(2, 4, 3, 3)
    axes = {"x": {0: "batch"}}
    torch.onnx.export(layer, x, tmp_path / "layer.onnx", input_names=["x"], dynamic_axes=axes, dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(3, 4, 3, 3)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), layer(x).detach())


def test_symbolic_trace(net):
    traced = torch.fx.symbolic_trace(net.eval())
    assert torch.equal(traced(images(3)), net(images(3)))


def test_autocast_of_a_part_alone(net):
    """On a float32 map in either layout, as nobody's network gives it."""
    cgsmm = net.get_submodule(f"{BLOCK}.token_mixing.cgsmm").eval()
    x = torch.randn(2, 8, 4, 4)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, :, :1].expand_as(x)):
        with torch.autocast("cpu", torch.bfloat16):
            y = cgsmm(given)
        assert y.dtype == torch.bfloat16
        assert relative_error(y.float(), cgsmm(given)) < 0.05


# ---- several processes ---------------------------------------------------------------------------

SHARDED = """
import functools, json, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tests.nets import tiny_net

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(0)

def step(net, images):
    loss = net(images).square().mean()
    loss.backward()
    return loss.item()

images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
found = {}
for kind in ("plain", "fsdp1", "fsdp2"):
    net = tiny_net(depths=(1, 1, 1, 1), drop_path_rate=0.0).eval()  # BatchNorm without batch statistics
    share = images
    if kind == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
        policy = functools.partial(size_based_auto_wrap_policy, min_num_params=50)
        net = FullyShardedDataParallel(net, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        assert sum(isinstance(module, FullyShardedDataParallel) for module in net.modules()) > 20
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh("cpu", (2,))
        for module in [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
            fully_shard(module, mesh=mesh)
        fully_shard(net, mesh=mesh)
    if kind != "plain":
        share = images.chunk(2)[rank]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    step(net, share)
    optimizer.step()
    with torch.no_grad():
        found[kind] = net(images).flatten().tolist()
print(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of PyTorch 2.6 needs CUDA")
def test_fully_sharded(tmp_path):
    """FSDP1 wrapped by size and FSDP2 on single layers take the step that one process takes."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    ranks = [Fork([tmp_path / "sharded.py", tmp_path / "meet", rank]) for rank in range(2)]
    for process in ranks:
        assert process.wait() == 0, process.stderr
        found = json.loads(process.stdout)
        assert relative_error(found["fsdp1"], found["plain"]) < 1e-4
        assert relative_error(found["fsdp2"], found["plain"]) < 1e-4


# ---- docs/clients.md -----------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split()[1])
def test_the_page_s_examples(block, tmp_path, monkeypatch):
    """They run, where their packages are installed."""
    for package in re.findall(r"^(?:import|from) (\w+)", block, re.M):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    loader = torch.utils.data.DataLoader([(images(1)[0], 1), (images(1)[0], 0)], batch_size=2)
    exec(block, {"models": models, "timm": timm, "torch": torch, "loader": loader, "net": tiny_net(img_size=224)})
