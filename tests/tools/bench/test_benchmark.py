"""The benchmark: what it makes of its times, and small runs of it as a user starts it."""

import json

import pytest
import torch

import engine
from engine import Precision
from tests import helpers
from tools.bench import benchmark, networks
from tools.bench.benchmark import Case, report
from tools.bench.networks import build_named
from utils import InputError

CPU = torch.device("cpu")
DIGITS = f"published:{helpers.DIGITS}"


def test_report_shows_the_cells():
    text = report({
        "environment": {"device": "CPU", "torch": "2", "timm": "1", "python": "3", "git_commit": "abc"},
        "date": "2026-01-01", "settings": {"batch_size": 8, "dtype": "fp32", "turns": 3, "threads": 2},
        "cases": {"training": {
            "published:a": {"seconds": [6.0, 2.0, 4.0], "peak_bytes": 2**30},
            "a": {"seconds": [2.0, 1.0, 4.0], "peak_bytes": 0},
            "large": {"seconds": [], "failed": "CUDA out of memory."},
        }},
    })
    assert "| published:a | 4000.00 (100 %) | 2.0 | 1.00 | 1.00 GiB |" in text
    # Turn by turn 3, 2 and 1 times faster: 2, while the medians alone say 4 / 2.
    assert "| a | 2000.00 (150 %) | 4.0 | 2.00 |  |" in text
    assert "| large | CUDA out of memory. | | | |" in text


def test_the_kernels_of_depthwise_convolutions(tmp_path, monkeypatch, capsys):
    chosen, backend = [], torch.backends.cudnn

    def build(name):
        chosen.append(backend.depthwise_kernel)
        raise InputError("stop")

    monkeypatch.setattr(benchmark, "build_named", build)
    argv = ["a", "--device", "cpu", "--modes", "inference", "--json", str(tmp_path / "b.json"), "--depthwise", "native"]
    if hasattr(backend, "depthwise_kernel"):
        monkeypatch.setattr(backend, "depthwise_kernel", "auto")
        assert benchmark.main(argv) == 2 and chosen == ["native"]
    else:
        assert benchmark.main(argv) == 2 and chosen == [] and "has no such choice" in capsys.readouterr().err


def test_compile_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "build_named", lambda name: 1 / 0)
    monkeypatch.setitem(engine.OPTIONS, "combo_kernels", True)
    argv = ["a", "--device", "cpu", "--json", str(tmp_path / "b.json"), "--compile-options"]
    with pytest.raises(ZeroDivisionError):
        benchmark.main([*argv, "combo_kernels=False", "triton.cudagraphs=True"])
    assert engine.OPTIONS.pop("triton.cudagraphs") is True and engine.OPTIONS["combo_kernels"] is False
    for word in ("combo_kernel=False", "combo_kernels=5", "combo_kernels", "combo_kernels=["):
        monkeypatch.setattr(networks, "OPTIONS", {})
        assert benchmark.main([*argv, word]) == 2
        error = capsys.readouterr().err
        assert f"--compile-options {word}: " in error and "combo_kernel" in error and len(error) < 400


def test_every_time_is_written_at_once(tmp_path, monkeypatch, capsys):
    """A network that fails is named, and the others are measured; what was measured before a stop is in the file."""
    file = tmp_path / "new" / "b.json"
    warm_up, time = Case.warm_up, Case.time

    def fail(case):
        if hasattr(case.network, "conv1"):  # the ResNet
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        warm_up(case)

    def stop(case):
        if len(case.seconds) == 1:
            raise KeyboardInterrupt
        time(case)

    monkeypatch.setattr(Case, "warm_up", fail)
    argv = [DIGITS, "test_resnet", "--device", "cpu", "--modes", "inference", "--batch-size",
            "1", "--json", str(file)]
    assert benchmark.main([*argv, "--turns", "1"]) == 0
    assert "| test_resnet | CUDA out of memory. |" in capsys.readouterr().out
    monkeypatch.setattr(Case, "time", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*argv, "--turns", "2"])
    found = json.loads(file.read_text())["cases"]["inference"]
    assert len(found[DIGITS]["seconds"]) == 1
    assert found["test_resnet"] == {"seconds": [], "failed": "CUDA out of memory."}


def test_networks_of_a_table(tmp_path, capsys):
    file = tmp_path / "b.json"
    assert benchmark.main(["--table", "cifar10_cpu", "--device", "cpu", "--modes", "training", "--batch-size", "2",
                           "--turns", "1", "--profile", "--json", str(file)]) == 0
    cases, printed = json.loads(file.read_text())["cases"]["training"], capsys.readouterr().out
    assert len(cases) >= 3 and all(case["seconds"][0] > 0 for case in cases.values())
    assert all(f"| {name} |" in printed for name in cases)
    assert printed.count("aten::convolution_backward") == len(cases)


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_step_trains_or_infers(mode):
    named = build_named(DIGITS)
    case = Case(named, mode, Precision("fp32", CPU), 2, CPU)
    before = named.network.head.weight.detach().clone()
    case.step()
    case.time()
    assert torch.equal(before, named.network.head.weight) == (mode == "inference") and case.seconds[0] > 0


@pytest.mark.parametrize("name, message", [
    ("strip_mlp_tyni", "strip_mlp_tyni is neither a timm model nor a config file; did you mean strip_mlp_tiny?"),
    ("fused:strip_mlp_tiny", "the prefixes are compiled: and published:"),
    ("published:test_resnet", "test_resnet is not a Strip-MLP, so it has no published formulation"),
    ("gone.yaml", "gone.yaml does not exist"),
])
def test_refused_networks(name, message):
    with pytest.raises(InputError, match=message):
        build_named(name)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("benchmark.py: --device cuda: PyTorch ")
