"""The benchmark: what it computes from its times, and one small run of it as a user starts it."""

import itertools
import json
import time

import pytest
import torch

from tools import benchmark
from tools.benchmark import Case, groups_of_cases, parse_arguments, report, seconds_of, speed_up


def case(form="ours", seconds=(2.0, 1.0, 4.0), **changes):
    values = {"model": "strip_mlp_tiny", "form": form, "mode": "training", "dtype": "fp32", "compiled": False,
              "batch_size": 8, "seconds": list(seconds)}
    return Case(**values | changes)


def test_images_per_second_and_speed_up_are_medians():
    assert case().images_per_second == 4.0
    # Turn by turn 3, 2 and 1 times faster: 2, while the medians alone would say 3 / 2.
    assert speed_up(case(seconds=(2.0, 1.0, 4.0)), case("published", (6.0, 2.0, 4.0))) == 2.0


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


def test_the_flags_choose_the_cases():
    args = parse_arguments(["--device", "cuda", "--models", "strip_mlp_tiny", "--peers", "convnext_tiny", "--modes",
                            "training", "--dtypes", "bf16", "fp16"])
    groups = groups_of_cases(args, torch.device("cuda"))
    assert {(c.model, c.form, c.mode, c.dtype, c.compiled) for group in groups for c in group} == {
        *(("strip_mlp_tiny", form, "training", "bf16", False) for form in ("published", "ours", "ours NCHW")),
        *(("strip_mlp_tiny", form, "training", "fp16", False) for form in ("published", "ours")),
        *(("strip_mlp_tiny", "ours", "training", dtype, True) for dtype in ("bf16", "fp16")),
        *(("convnext_tiny", "timm", "training", *rest) for rest in itertools.product(("bf16", "fp16"), (False, True))),
    }
    assert all(len({(c.mode, c.dtype, c.compiled) for c in group}) == 1 for group in groups)


def test_inference_is_measured_before_anything_is_trained():
    args = parse_arguments(["--device", "cpu", "--modes", "inference", "training"])
    modes = [group[0].mode for group in groups_of_cases(args, torch.device("cpu"))]
    assert modes == sorted(modes) and set(modes) == {"inference", "training"}


def test_a_group_that_fails_is_named_and_the_others_are_measured(monkeypatch):
    def measure(cases, args, device):
        if cases[0].model == "large":
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(benchmark, "measure", measure)
    groups = [[case()], [case(model="large")], [case(), case()]]
    measured, failed = benchmark.measure_groups(groups, None, torch.device("cpu"))
    assert len(measured) == 3 and failed == ["training fp32 large (CUDA out of memory.)"]


def test_seconds_of_repeats_short_functions():
    calls = []
    assert 0.01 <= seconds_of(lambda: calls.append(time.sleep(0.01))) < 1
    once = len(calls)
    seconds_of(lambda: calls.append(time.sleep(0.01)), least=0.2)
    assert once <= 3 and len(calls) - once >= 5  # the first two of them warm up


@pytest.mark.parametrize("form", ["published", "ours", "fused"])
def test_a_step_trains_or_infers(form):
    mode = "inference" if form == "fused" else "training"
    network, step = benchmark.build_step(
        case(form, model="strip_mlp_tiny_light", batch_size=2, mode=mode), 32, torch.device("cpu"))
    before = network.head.weight.detach().clone()
    step()
    assert torch.equal(before, network.head.weight) == (mode == "inference")


def test_own_bytes():
    layer = torch.nn.BatchNorm1d(5)  # 5 weights and 5 biases, 5 means and 5 variances, a count of 8 bytes
    assert benchmark.own_bytes(layer, "inference") == 4 * 20 + 8
    assert benchmark.own_bytes(layer, "training") == 4 * 40 + 8


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
