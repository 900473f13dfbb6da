"""tools/measure_gpu.py with small commands in the place of its own."""

import json

import pytest
import torch

from tools import benchmark, measure_gpu, roofline
from tools.measure_gpu import Part


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    environment = dict.fromkeys(("python", "torch", "timm", "git_commit"), "1") | {"device": "a GPU"}
    monkeypatch.setattr(measure_gpu, "describe_environment", lambda device: environment)


def test_parts_that_fail_or_hang_do_not_stop_the_others(gpu, tmp_path, monkeypatch):
    script = tmp_path / "write.py"
    script.write_text("import sys\nprint('# `command`\\n\\n| a table |')\nopen(sys.argv[2], 'w').write('[7]')\n")
    monkeypatch.setattr(measure_gpu, "PARTS", {
        "tests": Part("-c print('3\\x20passed')", 20, writes_json=False),
        "hangs": Part("-c while(True):pass", 1),
        "fails": Part("-c 1/0", 20),
        "writes": Part(str(script), 20),
    })
    assert measure_gpu.main(["--output", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    parts = report["parts"]
    assert report["environment"]["device"] == "a GPU"
    assert {name: part["ended"] for name, part in parts.items()} == {
        "tests": "finished", "hangs": "stopped after its limit of 1 seconds", "fails": "failed with status 1",
        "writes": "finished"}
    assert parts["writes"]["result"] == [7] and "ZeroDivisionError" in parts["fails"]["errors"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert "3 passed" in page and "\n| a table |\n" in page and "ZeroDivisionError" in page
    assert measure_gpu.main(["--output", str(tmp_path / "out"), "--parts", "writes"]) == 0


def test_the_limits_add_up_to_nine_minutes():
    assert sum(part.limit for part in measure_gpu.PARTS.values()) <= 9 * 60


def test_the_commands_are_those_of_the_tools():
    for part in measure_gpu.PARTS.values():
        tool, *words = part.words.split()
        if tool.endswith(".py"):
            {"tools/benchmark.py": benchmark, "tools/roofline.py": roofline}[tool].parse_arguments(words)


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure_gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert "finds no CUDA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
