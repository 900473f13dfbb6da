"""tools/bench/gpu_day.py with small commands in the place of its own."""

import time

import pytest
import timm
import torch

from arguments import argument_parser, config_overrides
from config import load_config
from tools.bench import benchmark, gpu_day
from tools.bench.gpu_day import PARTS, WARM_UP, Part


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment = dict.fromkeys(("python", "torch", "timm", "git_commit"), "1") | {"device": "a GPU"}
    monkeypatch.setattr(gpu_day, "describe_environment", lambda device: environment)


RESULT = {
    "environment": dict.fromkeys(("device", "torch", "timm", "python", "git_commit"), "1"), "date": "today",
    "settings": {"batch_size": 8, "dtype": "bf16", "turns": 3, "threads": 1},
    "cases": {"training": {"a": {"seconds": [2.0], "peak_bytes": 0}}},
}


def test_parts_that_fail_or_hang_do_not_stop_the_others(gpu, tmp_path, monkeypatch, capsys):
    """And what a part had measured when it was stopped is in the report."""
    script = tmp_path / "write.py"
    script.write_text(f"import json, sys, time\nopen(sys.argv[2], 'w').write(json.dumps({RESULT!r}))\n"
                      "time.sleep(float(sys.argv[1]))\n")
    monkeypatch.setattr(gpu_day, "WARM_UP", Part("-c print(1)", 20))
    monkeypatch.setattr(gpu_day, "PARTS", {
        "tests": Part("-c print('3\\x20passed')", 20), "training": Part(f"{script} 60 {{json}}", 3),
        "inference": Part("-c 1/0", 20), "cifar10": Part(f"{script} 0 {{json}}", 20),
    })
    argv = ["--output", str(tmp_path / "out"), "--parts"]
    assert gpu_day.main([*argv, "tests", "training", "inference", "cifar10"]) == 1
    assert capsys.readouterr().out.splitlines()[:5] == [
        "tests: finished", "warm up: finished", "training: stopped after 3 seconds",
        "inference: failed with status 1", "cifar10: finished"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.startswith('# Measured on a GPU\n\n{"python": "1", ')
    assert "3 passed" in page and "ZeroDivisionError" in page and page.count("| a | 2000.00 (0 %) | 4.0 | 1.00 |") == 2
    assert gpu_day.main([*argv, "cifar10"]) == 0


def test_it_ends_in_time(gpu, tmp_path, monkeypatch, capsys):
    """What does not fit any more is left out."""
    monkeypatch.setattr(gpu_day, "WARM_UP", Part("-c 1", 20))
    monkeypatch.setattr(gpu_day, "PARTS", {name: Part("-c while(True):pass", 60) for name in PARTS})
    start = time.monotonic()
    assert gpu_day.main(["--output", str(tmp_path), "--minutes", "0.09"]) == 1
    assert time.monotonic() - start < 10
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["tests", "warm up"]
    assert "## Training" not in (tmp_path / "report.md").read_text()


def test_everything_fits_into_eight_minutes():
    """The warm-up and the tests run at the same time."""
    limits = {name: part.limit for name, part in PARTS.items()}
    assert max(WARM_UP.limit, limits.pop("tests")) + sum(limits.values()) <= 8 * 60


def test_the_commands_are_those_of_the_tools():
    for part in (WARM_UP, *PARTS.values()):
        tool, *words = part.words.split()
        if tool == "main.py":
            args = argument_parser().parse_args(words)
            assert load_config(args.cfg, config_overrides(args)).TRAIN.EPOCHS == 1
        elif tool.endswith(".py"):
            assert tool == "tools/bench/benchmark.py"
            assert all(timm.is_model(name.split(":")[-1]) for name in benchmark.PARSER.parse_args(words).networks)


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_day.main(["--output", str(tmp_path / "out")]) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
