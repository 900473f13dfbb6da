"""The choice of device and precision, on machines that are only pretended."""

import pytest
import torch

import distributed
from distributed import choose_device
from engine import choose_precision
from utils import InputError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends a machine: what ``nvidia-smi`` prints, and what PyTorch finds."""

    def pretend(smi="", found=(), cuda="13.0", hip=None, accelerator=None):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        if smi:
            (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{smi}'\n")
            (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(distributed, "_GPU_FILE", tmp_path / "no gpu")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Pretended GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: found[0])
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))

    return pretend


@pytest.mark.parametrize("name, index, given, expected", [
    ("", 0, {}, "cpu"),
    ("cpu", 0, {}, "cpu"),
    ("", 1, {"found": [(9, 0), (9, 0)]}, "cuda:1"),
    ("cuda", 0, {"found": [(7, 5)]}, "cuda:0"),
    ("cpu", 0, {"found": [(9, 0)]}, "cpu"),
    ("cpu", 0, {"smi": "Tesla V100-SXM2-16GB, 470.57.02"}, "cpu"),
    ("mps", 0, {"accelerator": "mps"}, "mps"),
    ("xpu", 0, {"accelerator": "xpu"}, "xpu"),
    ("", 0, {"found": [(9, 4)], "hip": "6.4"}, "cuda:0"),
])
def test_choice(machine, name, index, given, expected):
    machine(**given)
    assert str(choose_device(name, index)) == expected


@pytest.mark.parametrize("name, index, given, message", [
    ("cuda", 0, {}, "--device cuda: .*finds no such device here; it finds cpu$"),
    ("mps", 0, {}, "--device mps: .*finds no such device here"),
    ("xpu", 0, {"accelerator": "mps"}, "it finds cpu and mps$"),
    ("", 2, {"found": [(9, 0)] * 2}, "process 2 of this machine has no GPU: 2 found; lower --nproc_per_node"),
    ("", 0, {"smi": "NVIDIA A100-SXM4-40GB, 535.104.05"},
     r"GPU \(NVIDIA A100-SXM4-40GB, driver 535.104.05\), .*CUDA 13.0 does not start \(.*a newer driver.*--device cpu$"),
    ("cuda", 0, {"smi": "Tesla T4, 580.65.06"}, "CUDA 13.0 does not start .*--device cpu$"),
    ("", 0, {"smi": "Tesla T4, 580.65.06", "cuda": None}, "built without CUDA. Install a build for this driver"),
])
def test_what_cannot_be_used_is_an_error_with_the_way_out(machine, name, index, given, message):
    machine(**given)
    with pytest.raises(InputError, match=message):
        choose_device(name, index)


@pytest.mark.parametrize("launcher", ["slurm", "torchrun"])
def test_the_only_gpu_that_a_task_sees_is_its_own(machine, monkeypatch, launcher):
    machine(found=[(9, 0)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher == "slurm":
        assert choose_device("", 3) == torch.device("cuda", 0)
    else:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with pytest.raises(InputError, match="process 3 of this machine has no GPU: 1 found"):
            choose_device("", 3)


def test_a_gpu_whose_tool_fails_counts_too(machine, monkeypatch, tmp_path):
    machine()
    (tmp_path / "no gpu").touch()
    with pytest.raises(InputError, match="nvidia-smi fails"):
        choose_device()


def test_a_variable_that_may_hide_the_gpu_is_named(machine, monkeypatch):
    machine(smi="Tesla T4, 580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(InputError, match="not start .*CUDA_VISIBLE_DEVICES is '5', is that right.*--device cpu$"):
        choose_device()


def test_a_gpu_that_was_hidden_on_purpose_is_no_error(machine, monkeypatch):
    machine(smi="Tesla T4, 470.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device().type == "cpu"


def test_an_accelerator_that_is_not_used_is_named(machine, caplog, monkeypatch):
    machine(accelerator="mps")
    monkeypatch.setattr(distributed.logger, "propagate", True)
    with caplog.at_level("INFO", "strip_mlp"):
        assert choose_device().type == "cpu"
    assert "--device mps selects this machine's accelerator" in caplog.text


@pytest.mark.parametrize("capability, expected, reason", [
    ((6, 1), "fp32", "6.1, has no tensor cores"), ((7, 0), "fp16", "no bf16"), ((7, 5), "fp16", "no bf16"),
    ((8, 0), "bf16", "Pretended GPU"), ((12, 0), "bf16", "Pretended GPU"),
])
def test_precision_follows_the_hardware(machine, capability, expected, reason):
    machine(found=[capability])
    name, why = choose_precision(CUDA)
    assert name == expected and reason in why


def test_precision_elsewhere(machine):
    machine(found=[(9, 4)], hip="6.4")
    assert choose_precision(CUDA)[0] == "bf16"
    assert choose_precision(torch.device("cpu"))[0] == choose_precision(torch.device("mps"))[0] == "fp32"
