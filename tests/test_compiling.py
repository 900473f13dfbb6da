"""Compiling the network for a training: where it is on, and going on without it."""

import logging

import pytest
import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.torch_version import TorchVersion

import compiling
from compiling import CompiledNetwork, compile_network
from models import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("setting, device, capability, deterministic, is_compiled", [
    ("auto", CPU, None, False, False), ("auto", CUDA, (8, 0), False, True), ("auto", CUDA, (7, 0), False, True),
    ("auto", CUDA, (6, 1), False, False), ("auto", CUDA, (9, 0), True, False), ("off", CUDA, (9, 0), False, False),
    ("on", CPU, None, False, True), ("on", CUDA, (9, 0), True, True),
])
def test_where_it_is_on(monkeypatch, setting, device, capability, deterministic, is_compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compiling, "strip_triton", object())
    monkeypatch.setattr(compiling, "EARLY", {"as in PyTorch 2.11": True})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    network = nn.Linear(2, 2)
    compiled = compile_network(network, setting, device, deterministic)
    assert isinstance(compiled, CompiledNetwork) == is_compiled
    assert is_compiled or compiled is network


def test_auto_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiling, "strip_triton", None)
    network = nn.Linear(2, 2)
    assert compile_network(network, "auto", CUDA) is network


def test_auto_needs_a_pytorch_that_can_fall_back(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiling, "strip_triton", object())
    monkeypatch.setattr(compiling, "EARLY", {})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    network = nn.Linear(2, 2)
    with caplog.at_level(logging.INFO, "strip_mlp"):
        assert compile_network(network, "auto", CUDA) is network
    assert "not compiling the network: if the backward pass fails to compile" in caplog.text
    assert isinstance(compile_network(network, "on", CUDA), CompiledNetwork)


@pytest.mark.parametrize("version, is_compiled", [("2.8.0", False), ("2.11.0+cu130", True), ("2.14.1", True)])
def test_checkpointed_networks_need_a_newer_pytorch(monkeypatch, version, is_compiled):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiling, "strip_triton", object())
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(compiling, "EARLY", {"as in PyTorch 2.11": True})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    network = nn.Linear(2, 2)
    network.grad_checkpointing = True
    assert isinstance(compile_network(network, "auto", CUDA), CompiledNetwork) == is_compiled
    if not is_compiled:
        with pytest.raises(InputError, match="PyTorch 2.8.0 counts BatchNorm's batches twice .* leave out"):
            compile_network(network, "on", CUDA)


def fail(x):
    raise TorchDynamoException("no compiler\nand much more")


def test_a_failure_is_said_and_training_goes_on(caplog):
    network = nn.Linear(2, 2)
    compiled = CompiledNetwork(network, may_fail=True)
    compiled.run = fail
    x = torch.ones(3, 2)
    with caplog.at_level(logging.WARNING, "strip_mlp"):
        assert torch.equal(compiled(x), network(x))
    assert "COULD NOT BE COMPILED (TorchDynamoException: no compiler)" in caplog.text and "much more" not in caplog.text
    caplog.clear()
    compiled(x).sum().backward()  # not tried again
    assert not caplog.text and network.weight.grad is not None


def test_a_failure_is_an_error_where_compiling_was_asked_for():
    compiled = CompiledNetwork(nn.Linear(2, 2), may_fail=False)
    compiled.run = fail
    with pytest.raises(TorchDynamoException):
        compiled(torch.ones(3, 2))


def test_other_errors_are_not_the_compilers():
    compiled = CompiledNetwork(nn.Linear(2, 2), may_fail=True)
    compiled.run = compiled.network
    with pytest.raises(RuntimeError, match="shapes"):
        compiled(torch.ones(3, 5))


@pytest.mark.slow
def test_compiled_it_trains_as_without_and_the_cache_serves_the_next_run(monkeypatch, tmp_path):
    """Gradients on the CPU, with the options that a GPU gets; a second compilation finds the first's result."""
    from torch._dynamo.utils import counters

    from models import StripMLPNet

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    network = StripMLPNet(img_size=32, embed_dim=8, depths=(1, 1, 1, 1), num_classes=3, drop_path_rate=0.0)
    images = torch.randn(4, 3, 32, 32)
    expected = torch.autograd.grad(network(images).square().sum(), list(network.parameters()))
    for hits in (0, 1):
        torch.compiler.reset()
        counters.clear()
        compiled = compile_network(network, "on", CPU)
        found = torch.autograd.grad(compiled(images).square().sum(), list(network.parameters()))
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-4)
        found_again = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
        assert (found_again > 0) == bool(hits)
