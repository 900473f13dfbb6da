"""The count of a step's traffic: on networks whose traffic is known by hand, and today's figures of Strip-MLP-T*."""

import re
from collections import defaultdict

import pytest
import torch
from torch import nn

from engine import EARLY
from models.strip_mlp import Block
from tests.helpers import DIGITS
from tools.bench import roofline, traffic
from tools.bench.traffic import count_compiled_step, count_step
from utils import InputError

N, SIDE = 4, 8
PIXELS = N * SIDE * SIDE


def by_operation(traffic):
    sums = defaultdict(lambda: [0, 0])
    for op in traffic.operations:
        sums[op.phase, op.name][0] += op.bytes
        sums[op.phase, op.name][1] += op.launches
    return {key: tuple(value) for key, value in sums.items()}


def small_network():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 16, 1), nn.Flatten(),
        nn.Linear(16 * SIDE * SIDE, 5),
    )
    return layers.to(memory_format=torch.channels_last).train()


def test_traffic_known_by_hand():
    found = by_operation(count_step(small_network(), (N, 3, SIDE, SIDE), training=True, dtype=None))
    x, map_8, map_16 = 4 * 3 * PIXELS, 4 * 8 * PIXELS, 4 * 16 * PIXELS  # bytes
    w0, w3, row = 4 * 8 * 27, 4 * 16 * 8, 4 * 8  # two weights, and one number of each of 8 channels
    expected = {
        ("forward", "convolution"): (x + w0 + map_8 + map_8 + w3 + 64 + map_16, 2),
        # weight, bias, running mean and variance, saved mean and deviation
        ("forward", "native_batch_norm"): (2 * map_8 + 6 * row, 1),
        ("forward", "gelu"): (2 * map_8, 1),
        # for each of dx, dw and db what it reads and writes; the images need no gradient
        ("backward", "convolution_backward"): (
            map_16 + w3 + map_8 + map_16 + map_8 + w3 + map_16 + 64 + map_8 + x + w0, 4),
        ("backward", "gelu_backward"): (3 * map_8, 1),
        # dy, x, dx; weight, running mean and variance, saved mean and deviation, two gradients
        ("backward", "native_batch_norm_backward"): (3 * map_8 + 7 * row, 1),
    }
    assert {key: found.get(key) for key in expected} == expected


def test_batch_norm_of_inference_reads_its_input_once():
    found = by_operation(count_step(small_network().eval(), (N, 3, SIDE, SIDE), training=False, dtype=None))
    map_8, row = 4 * 8 * PIXELS, 4 * 8
    assert found["forward", "native_batch_norm"] == (2 * map_8 + 4 * row, 1)


def test_operations_and_floor():
    traffic = count_step(small_network(), (N, 3, SIDE, SIDE), training=False, dtype=None)
    assert traffic.total("flops") == 2 * (PIXELS * (8 * 27 + 16 * 8) + N * 16 * SIDE * SIDE * 5)
    bandwidth, rate = 1e9, 1e15
    assert traffic.seconds(bandwidth, rate) == pytest.approx(traffic.total("bytes") / bandwidth)
    assert traffic.seconds(1e15, 1e9) == pytest.approx(traffic.total("flops") / 1e9, rel=1e-2)


def test_autocast_casts_and_halves():
    network = small_network()[:3]
    found = by_operation(count_step(network, (N, 3, SIDE, SIDE), training=False))
    assert found["forward", "gelu"] == (2 * 2 * 8 * PIXELS, 1)
    assert found["forward", "_to_copy"] == (6 * (3 * PIXELS + 8 * 27), 2)  # the images and the weight


def test_peak_memory():
    """Three maps at a time: the input, which the caller keeps, a GELU's input and its output."""
    network = nn.Sequential(nn.GELU(), nn.GELU(), nn.GELU())
    size = 4 * 128 * 32 * 32
    assert count_step(network, (1, 128, 32, 32), training=False, dtype=None).peak_bytes == 3 * size


needs_early_planning = pytest.mark.skipif(not EARLY, reason="this PyTorch cannot plan a backward pass early")


@needs_early_planning
def test_compiled_traffic_known_by_hand():
    """Compiled, a chain of pointwise operations is one kernel that reads a map and writes one."""
    network = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.GELU(), nn.Hardtanh(), nn.GELU())
    traffic = count_compiled_step(network, (N, 8, SIDE, SIDE), training=False, dtype=None)
    size, weight = 4 * 8 * PIXELS, 4 * 64
    found = {op.name: op.bytes for op in traffic.operations}
    assert found == {"convolution": 2 * size + weight, "fused loops": 2 * size}


@needs_early_planning
def test_options_of_the_compiler():
    """No activations are copied for a convolution's backward pass, and the casts of weights share a launch."""
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 8, 3, groups=8, bias=False))
    network = network.to(memory_format=torch.channels_last)
    traffic = count_compiled_step(network, (N, 8, SIDE, SIDE), training=True)
    names = [(op.phase, op.name) for op in traffic.operations]
    assert names.count(("forward", "fused loops")) == 1  # casts the images and both weights
    assert names.count(("backward", "fused loops")) == 2  # cast the weights' gradients, one by one as they appear
    assert max(op.bytes for op in traffic.operations if op.phase == "backward" and op.name == "fused loops") < 1000


def one_block(dim=80, side=56):
    """T*'s stem and first block, or another of its blocks, then a mean over the tokens."""
    block = Block(dim, side, num_patches=2, strip_width=3, mlp_ratio=3.0, drop_path=0.1)
    stem = nn.Conv2d(3, dim, 4, 4, bias=False)
    network = nn.Sequential(stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return network.to(memory_format=torch.channels_last)


def test_figures_of_strip_mlp_do_not_grow():
    """At batch 128 in bfloat16. Lower the limits when the step gets lighter."""
    traffic = count_step(one_block(), (128, 3, 224, 224), training=True)
    assert traffic.total("bytes") / 128 < 163e6
    assert traffic.peak_bytes < 2.6 * 2**30
    traffic = count_step(one_block(640, 7), (128, 3, 28, 28), training=True)  # the last block
    assert traffic.total("bytes") / 128 < 21.5e6


def test_a_pytorch_that_cannot_plan_a_step_is_an_error(monkeypatch):
    monkeypatch.setattr(traffic, "EARLY", {})
    with pytest.raises(InputError, match="cannot plan a compiled step without running it; use 2.11 or newer"):
        count_compiled_step(nn.Flatten(), (1, 3, 2, 2), training=True)


@needs_early_planning
@pytest.mark.slow
def test_compiled_figures_of_strip_mlp_do_not_grow():
    """Inductor's own settings move more, in more launches."""
    traffic = count_compiled_step(one_block(), (128, 3, 224, 224), training=True)
    assert traffic.total("bytes") / 128 < 89e6
    assert traffic.total("launches") < 105


def test_command(capsys):
    assert roofline.main([str(DIGITS), "--mode", "inference", "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    (step,) = re.findall(r"\| step \| ([\d.]+) \|", printed)
    (operations, _) = printed.partition("| operation |")[2].split("| GPU |")
    sizes = [float(line.split(" | ")[1]) for line in operations.splitlines()[2:] if line]
    assert 0.9 * float(step) < sum(sizes) < 1.01 * float(step) and sizes == sorted(sizes, reverse=True)
    assert "| H200 | 4800 | 989 |" in printed


def test_published_moves_more(capsys):
    """Strip layers over permuted copies, and every sum written out."""
    moved = []
    for prefix in ("published:", ""):
        assert roofline.main([f"{prefix}{DIGITS}", "--mode", "inference", "--batch-size", "64"]) == 0
        moved.append(float(re.search(r"step \| ([\d.]+)", capsys.readouterr().out)[1]))
    assert moved[0] > 1.5 * moved[1]


def test_refused_flags(capsys):
    assert roofline.main(["strip_mlp_tiny", "--batch-size", "0"]) == 2
    assert "--batch-size is 0; it must be at least 1" in capsys.readouterr().err
