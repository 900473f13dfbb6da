"""The benchmark: what it reports of its times, and one small run of it as a user starts it."""

import json

import torch

from tests.tools.lib.test_network_times import case
from tools import benchmark
from tools.benchmark import report
from tools.lib.network_times import Case


def test_report_shows_the_cells():
    result = {
        "environment": {"device": "CPU", "torch": "2", "timm": "1", "python": "3", "git_commit": "abc"},
        "date": "2026-01-01", "settings": {"batch_size": 8, "img_size": 224, "repeats": 3, "dtypes": ["fp32"],
                                           "threads": 2},
        "cases": [vars(case("published", (6.0, 2.0, 4.0))), vars(case()),
                  vars(case("timm", model="resnet50", mode="inference"))],
        "device": {"bytes_per_second": 4e9, "flops": 1e12},
        "operator": [{"stage": 1, "shape": [8, 40, 56, 56], "axis": "row", "form": "matmul", "forward_seconds": 1e-3,
                      "forward_backward_seconds": 4e-3, "bytes_per_second": 1e9, "flops": 5e11}],
        "pipeline": None, "failed": ["training bf16 resnet50 (out of memory)"],
    }
    text = report(result)
    assert "| strip_mlp_tiny | published | fp32 | 2.0 (100 %) | 1.00 |  |" in text
    assert "| strip_mlp_tiny | ours | fp32 | 4.0 (150 %) | 2.00 |  |" in text
    assert "| resnet50 | timm | fp32 | 4.0 (150 %) |  |  |" in text
    assert "| 1 (8, 40, 56, 56) | row | matmul | 1.000 ms | 4.000 ms | 1.0, 25 % | 0.500 |" in text
    assert "Failed: training bf16 resnet50 (out of memory)." in text


def test_command(tmp_path, capsys):
    file = tmp_path / "new" / "b.json"
    assert benchmark.main(["--device", "cpu", "--models", "strip_mlp_tiny_light", "--peers", "resnet18", "--modes",
                           "inference", "--img-size", "32", "--batch-size", "2", "--repeats", "1",
                           "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    cases = [Case(**values) for values in result["cases"]]
    assert {(c.model, c.form, c.mode) for c in cases} == {
        *(("strip_mlp_tiny_light", form, "inference") for form in ("published", "ours", "fused")),
        ("resnet18", "timm", "inference"),
    }
    assert all(len(c.seconds) == 1 and c.seconds[0] > 0 for c in cases)
    assert len(result["operator"]) == 2 * 4 * 2 * 2  # two networks, four stages, two axes, two forms
    assert result["pipeline"]["images_per_second_and_worker"] > 0
    assert 0 <= result["pipeline"]["share_of_step_waiting"] < 1
    printed = capsys.readouterr().out
    assert "| resnet18 | timm | fp32 |" in printed and f"--json {file}" in printed


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["--device", "cuda", "--json", str(tmp_path / "b.json")]) == 2
    assert capsys.readouterr().err == (
        "benchmark.py: --device cuda: PyTorch finds no CUDA GPU here; use --device cpu\n")
