"""What docs/reproduce.md and docs/results.md say that a program can check: commands, files, estimates, tables."""

import re
import shlex

import pytest
import torch

from arguments import argument_parser, config_overrides, parse_arguments
from config import load_config
from logger import count_macs
from models import build_model
from tests.processes import ROOT
from tools import paper_tables, reproduce

REPRODUCE, RESULTS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("reproduce.md", "results.md"))


def commands(text):
    """The commands of the bash blocks, as lists of words."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
        for line in re.sub(r"<<'END'.*?^END", "", block.replace("\\\n", " "), flags=re.S | re.M).splitlines():
            yield shlex.split(line.removeprefix("OMP_NUM_THREADS=1 "), comments=True)


@pytest.mark.parametrize("text", [REPRODUCE, RESULTS], ids=["reproduce", "results"])
def test_commands_and_files(text, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = list(commands(text))
    assert found
    for words in found:
        if words[:2] == ["python", "tools/reproduce.py"]:
            assert reproduce.main([*words[2:], "--dry-run"]) == 0, words
        elif words[:2] == ["python", "main.py"]:
            args = parse_arguments(argument_parser(), words[2:])
            load_config(args.cfg, config_overrides(args))
        elif words[:2] == ["python", "tools/paper_tables.py"]:
            assert set(words[2:3]) <= paper_tables.read_tables().keys()
    files = re.findall(r"\]\((?!http)([^)#]+)", text)
    files += [f"../{name}" for name in re.findall(r"`((?:tests|tools)/[\w/]+\.\w+)`", text)]
    assert [name for name in files if not (ROOT / "docs" / name).exists()] == []


@pytest.mark.parametrize("table", ["cifar10_nano", "digits_finetune", "cifar10_cpu", "cifar10_gpu"])
def test_tables_are_those_that_the_tool_makes_of_the_records(table, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert paper_tables.main([table, "--runs", "docs/results"]) == 0
    assert capsys.readouterr().out.partition("\n\n")[2].strip() in RESULTS


def test_records_hold_no_path_of_another_machine():
    records = [path for path in (ROOT / "docs" / "results").rglob("*") if path.is_file()]
    assert len(records) >= 3
    for path in records:
        assert not re.search(r"(?<![\w.])/\w+/", path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_estimated_costs():
    """By the formula in the page: 6 operations for each multiply-accumulate, 3e13 of them a second."""
    images = {"imagenet": 1_281_167, "cifar10": 50_000, "cifar100": 50_000, "caltech101": 6_900}
    tables = paper_tables.read_tables()
    claimed = dict(re.findall(r"^\| `(\w+)` \|.* estimate ([\d.]+) \|$", REPRODUCE, re.M))
    assert len(claimed) == 5
    for table, hours in claimed.items():
        operations = 0
        for config in [row.config() for row in tables[table][1]]:
            with torch.device("meta"):
                macs = count_macs(build_model(config), (3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE))
            operations += 6 * macs * images[config.DATA.DATASET] * config.TRAIN.EPOCHS
        assert float(f"{operations / 3e13 / 3600:.2g}") == float(hours), table
