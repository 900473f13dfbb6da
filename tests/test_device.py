"""The choice of device, precision and form, on machines that are only pretended."""

import inspect
import os
import re

import pytest
import torch

import device
import distributed
from config import load_config
from device import settle_form, why_not_triton
from distributed import choose_device
from engine import choose_precision
from models import build_model
from models.strip_mlp import StripMLP
from tests.helpers import DIGITS, TINY
from utils import InputError

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretends a machine: what ``nvidia-smi`` prints, and what PyTorch finds."""

    def pretend(smi="", found=(), cuda="13.0", hip=None, archs=("sm_75", "sm_80", "sm_90", "sm_120"), accelerator=None):
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
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
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
    ("", 0, {"found": [(8, 9)]}, "cuda:0"),  # code for 8.0 runs on 8.9
    ("", 0, {"found": [(12, 1)], "archs": ["sm_90", "compute_90"]}, "cuda:0"),  # PTX runs on later generations
    ("", 0, {"found": [(9, 0)], "archs": ["sm_90a", "sm_100"]}, "cuda:0"),
    ("", 0, {"found": [(9, 4)], "hip": "6.4", "archs": ["gfx942"]}, "cuda:0"),
])
def test_choice(machine, name, index, given, expected):
    machine(**given)
    assert str(choose_device(name, index)) == expected


@pytest.mark.parametrize("name, index, given, message", [
    ("cuda", 0, {}, "--device cuda: .*finds no such device here; it finds cpu$"),
    ("mps", 0, {}, "--device mps: .*finds no such device here"),
    ("xpu", 0, {"accelerator": "mps"}, "it finds cpu and mps$"),
    ("", 2, {"found": [(9, 0)]}, "process 2 of this machine has no GPU: 1 found; lower --nproc_per_node"),
    ("", 0, {"smi": "NVIDIA A100-SXM4-40GB, 535.104.05"},
     r"NVIDIA A100-SXM4-40GB, driver 535.104.05\), .*built for CUDA 13.0. That needs driver 580 or newer: update the "
     r"driver, or install a build for an older CUDA .*driver 525 runs CUDA 12.*--device cpu$"),
    ("cuda", 0, {"smi": "NVIDIA A100-SXM4-40GB, 535.104.05"}, "driver 580 or newer"),
    ("", 0, {"smi": "Tesla T4, 580.65.06"}, "CUDA does not start: .*nvidia-smi.*--device cpu$"),
    ("", 0, {"smi": "Tesla T4, 580.65.06", "cuda": None}, "built without CUDA. Install a CUDA build"),
    ("", 0, {"found": [(7, 0)]}, "compute capability 7.0, for which .*only sm_75, sm_80.*another CUDA version"),
    ("", 0, {"found": [(8, 0)], "archs": ["sm_86"]}, "compute capability 8.0, for which"),
])
def test_what_cannot_be_used_is_an_error_with_the_way_out(machine, name, index, given, message):
    machine(**given)
    with pytest.raises(InputError, match=message):
        choose_device(name, index)


def test_a_gpu_whose_tool_fails_counts_too(machine, monkeypatch, tmp_path):
    machine()
    (tmp_path / "no gpu").touch()
    with pytest.raises(InputError, match="nvidia-smi fails, driver"):
        choose_device()


def test_a_variable_that_may_hide_the_gpu_is_named(machine, monkeypatch):
    machine(smi="Tesla T4, 580.65.06")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(InputError, match="not start: .*CUDA_VISIBLE_DEVICES is '5': check .*unset .*--device cpu$"):
        choose_device()


def test_a_gpu_that_was_hidden_on_purpose_is_no_error(machine, monkeypatch):
    machine(smi="Tesla T4, 470.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device().type == "cpu"


def test_an_accelerator_that_is_not_used_is_named(machine, caplog, monkeypatch):
    machine(accelerator="mps")
    monkeypatch.setattr(device.logger, "propagate", True)
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


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float16])
def test_the_probe_passes_where_the_kernels_work(dtype, monkeypatch):
    """Without PyTorch's deterministic mode, in which matrix products on CUDA need a variable of the environment."""
    def refused(*args, **kwargs):
        raise AssertionError("the probe changed a setting of the whole process")

    monkeypatch.setattr(torch, "use_deterministic_algorithms", refused)
    pytest.importorskip("triton")
    if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("needs a CUDA GPU or Triton's interpreter")
    assert why_not_triton(CUDA if torch.cuda.is_available() else torch.device("cpu"), dtype) == ""


def test_the_probe_without_triton(monkeypatch):
    monkeypatch.setattr(device, "strip_triton", None)
    reason = why_not_triton(torch.device("cpu"), torch.float32)
    assert reason == "the package triton, which comes with PyTorch's CUDA builds, is not installed"


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
    pytest.importorskip("triton")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # Triton 3.2 imports it, as pytest has already
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "a file" / "cache"))
    monkeypatch.setattr(device, "strip_mix", lambda *args: launch())
    reason = why_not_triton(torch.device("cpu"), torch.float32)
    assert re.search(message, reason) and len(reason.splitlines()) == 1


@pytest.mark.parametrize("wrong", ["result", "gradient of x", "of the weight", "of the bias"])
def test_the_probe_finds_wrong_results(monkeypatch, wrong):
    def mix(x, weight, bias, axis, form):
        factor = 1.2 if wrong == "result" else 1.0
        leaves = {"gradient of x": x, "of the weight": weight, "of the bias": bias}
        if wrong in leaves:
            leaves[wrong].register_hook(lambda grad: grad * 1.2)
        return device.strip_mix_plain(x, weight, bias, axis) * factor

    monkeypatch.setattr(device, "strip_mix", mix)
    assert f"their {wrong} differs from the formula's by" in why_not_triton(torch.device("cpu"), torch.float32)


def test_no_kernels_before_ampere(machine):
    machine(found=[(7, 5)])
    assert "compute capability 7.5 is below 8.0" in why_not_triton(CUDA, torch.float16)
    with pytest.raises(InputError, match="FORM is triton, but .*7.5 is below 8.0.*set it to auto"):
        settle(form="triton")


def settle(form="auto", dtype=torch.bfloat16):
    config = load_config(DIGITS, [*TINY, "MODEL.STRIP_MLP.FORM", form])
    model = build_model(config)
    settle_form(config, model, CUDA, dtype)
    return {module.form for module in model.modules() if isinstance(module, StripMLP)}


def test_matrix_products_where_any_process_lacks_the_kernels(machine, monkeypatch, caplog):
    """Every process hears of the one that cannot, and all compute alike."""
    machine(found=[(9, 0)])
    monkeypatch.setattr(device.logger, "propagate", True)
    monkeypatch.setattr(device, "why_not_triton", lambda *args: "")
    monkeypatch.setattr(device.distributed, "gather_objects", lambda value: [value, "no C compiler", value])
    assert settle() == {"matmul"}
    assert "do not work on rank 1: no C compiler" in caplog.text
    assert settle(dtype=torch.float32) == {"auto"}  # no kernels without TF32, so none are probed
    assert settle("plain") == {"plain"}
    with pytest.raises(InputError, match="FORM is triton, but Triton's kernels do not work on rank 1: no C compiler"):
        settle("triton")
    monkeypatch.setattr(device.distributed, "gather_objects", lambda value: [value] * 3)
    assert settle() == {"auto"}
