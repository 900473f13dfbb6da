"""What the README says that a program can check."""

import re

import timm
import torch

import models
from tests.helpers import ROOT, run

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_two_commands_set_everything_up():
    commands = [line for block in blocks("bash") for line in block.splitlines() if "-m venv" in line]
    assert len(commands) == 2
    assert "requirements.txt" in commands[0] and "digits.yaml" in commands[0]
    assert "requirements-test.txt" in commands[1] and commands[1].endswith("python -m pytest")
    assert commands[1] == next(line for line in README.splitlines() if re.search("venv .*pytest", line))  # by .ci/run


def test_every_file_that_it_names_exists():
    names = set(re.findall(r"`((?:tests|configs|tools|data)/[\w./]+)`", README))
    names |= set(re.findall(r"configs/smlp_\w+\.yaml", README)) | set(re.findall(r"\]\((?!http)([^)]+)\)", README))
    assert len(names) > 15
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_documents_show_what_exists_and_stays_small():
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / name).exists(), f"{page.name} links to {name}"
    for image in (ROOT / "docs").rglob("*.png"):
        assert image.stat().st_size < 80_000, image


def test_python_example_runs(tmp_path):
    """On a checkpoint in the released format."""
    example, = blocks("python")
    torch.manual_seed(0)
    net = timm.create_model("strip_mlp_tiny")
    torch.save({"model": models.to_released_state_dict(net.state_dict())}, tmp_path / "strip_mlp_tiny.pth")
    script = example.replace('"strip_mlp_tiny.pth"', repr(str(tmp_path / "strip_mlp_tiny.pth")))
    check = "\nassert probabilities.shape == (1, 1000) and abs(float(probabilities.detach().sum()) - 1) < 1e-5"
    check += f"\nassert torch.equal(net.head.bias, torch.load({str(tmp_path)!r} + '/head.pth'))"
    torch.save(net.head.bias.detach(), tmp_path / "head.pth")
    result = run(["-c", script + check])
    assert result.returncode == 0, result.stderr
