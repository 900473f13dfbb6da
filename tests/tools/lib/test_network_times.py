"""Times of networks: which cases the flags choose, and what is computed from the times."""

import itertools
import time

import pytest
import torch

from tools.benchmark import parse_arguments
from tools.lib import network_times
from tools.lib.network_times import Case, groups_of_cases, seconds_of, speed_up


def case(form="ours", seconds=(2.0, 1.0, 4.0), **changes):
    values = {"model": "strip_mlp_tiny", "form": form, "mode": "training", "dtype": "fp32", "compiled": False,
              "batch_size": 8, "seconds": list(seconds)}
    return Case(**values | changes)


def test_images_per_second_and_speed_up_are_medians():
    assert case().images_per_second == 4.0
    # Turn by turn 3, 2 and 1 times faster: 2, while the medians alone would say 3 / 2.
    assert speed_up(case(seconds=(2.0, 1.0, 4.0)), case("published", (6.0, 2.0, 4.0))) == 2.0


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

    monkeypatch.setattr(network_times, "measure", measure)
    groups = [[case()], [case(model="large")], [case(), case()]]
    measured, failed = network_times.measure_groups(groups, None, torch.device("cpu"))
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
    network, step = network_times.build_step(
        case(form, model="strip_mlp_tiny_light", batch_size=2, mode=mode), 32, torch.device("cpu"))
    before = network.head.weight.detach().clone()
    step()
    assert torch.equal(before, network.head.weight) == (mode == "inference")


def test_own_bytes():
    layer = torch.nn.BatchNorm1d(5)  # 5 weights and 5 biases, 5 means and 5 variances, a count of 8 bytes
    assert network_times.own_bytes(layer, "inference") == 4 * 20 + 8
    assert network_times.own_bytes(layer, "training") == 4 * 40 + 8
