"""What the README says that a program can check."""

import re
import shlex
import shutil

import timm
import torch
from PIL import Image

import models
from tests.helpers import DIGITS
from tests.processes import ROOT, run

README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_two_commands_set_everything_up():
    commands = [line for block in blocks("bash") for line in block.splitlines() if "-m venv" in line]
    assert len(commands) == 2
    assert "requirements.txt" in commands[0] and "digits.yaml" in commands[0]
    assert "requirements-test.txt" in commands[1] and commands[1].endswith("python -m pytest -n 4 --dist worksteal")
    assert commands[1] == next(line for line in README.splitlines() if re.search("venv .*pytest", line))  # by .ci/run


def test_every_file_that_it_names_exists():
    names = set(re.findall(r"`((?:tests|configs|tools|data|weights)/[\w./]+)`", README))
    names |= set(re.findall(r"configs/(?:small/)?smlp_\w+\.yaml", README))
    names |= set(re.findall(r"\]\((?!http)([^)]+)\)", README))
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_documents_show_what_exists_and_stays_small():
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / name).exists(), f"{page.name} links to {name}"
    for image in (ROOT / "docs").rglob("*.png"):
        assert image.stat().st_size < 80_000, image


def test_example_of_published_weights_in_timm(tmp_path):
    """On a checkpoint in the released format."""
    example, = blocks("python", (ROOT / "docs/weights.md").read_text())
    torch.manual_seed(0)
    net = timm.create_model("strip_mlp_tiny")
    torch.save({"model": models.to_released_state_dict(net.state_dict())}, tmp_path / "strip_mlp_tiny.pth")
    script = example.replace('"strip_mlp_tiny.pth"', repr(str(tmp_path / "strip_mlp_tiny.pth")))
    check = "\nassert probabilities.shape == (1, 1000) and abs(float(probabilities.detach().sum()) - 1) < 1e-5"
    check += f"\nassert torch.equal(net.head.bias, torch.load({str(tmp_path)!r} + '/head.pth'))"
    torch.save(net.head.bias.detach(), tmp_path / "head.pth")
    result = run(["-c", script + check])
    assert result.returncode == 0, result.stderr


def test_prediction_from_python():
    """As it stands there."""
    example, = (block for block in blocks("python") if "load_network" in block)
    assert len([line for line in example.splitlines() if line]) <= 11
    result = run(["-c", example], folder=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"cat \d\d\.\d%", lines[0]) and len(lines) == 3


def test_your_own_data_in_three_steps(tmp_path):
    """The commands as they stand there, where the config is that of a small network.

    Cats are dark and dogs are light here; the network learns it and tells them apart.
    """
    commands, = (block for block in blocks("bash") if "64_imagefolder.yaml" in block)
    assert "`pets/train/<class>/` and `pets/val/<class>/`" in README
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("main.py", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    name, = set(re.findall(r"configs/small/\S+\.yaml", commands))
    (tmp_path / name).write_text(f"""
        BASE: [../{DIGITS.name}]
        DATA: {{DATASET: imagefolder, IMG_SIZE: 16, BATCH_SIZE: 10, NUM_WORKERS: 0}}
        MODEL: {{STRIP_MLP: {{EMBED_DIM: 8, DEPTHS: [1, 1, 1, 1]}}}}
        TRAIN: {{EPOCHS: 4, WARMUP_EPOCHS: 1}}
    """)
    generator = torch.Generator().manual_seed(0)
    for place, count in (("train", 40), ("val", 10)):
        for pet, brightness in (("cat", 60), ("dog", 190)):
            folder = tmp_path / "pets" / place / pet
            folder.mkdir(parents=True)
            for number in range(count):
                _picture(brightness, generator).save(folder / f"{number}.jpg")
    _picture(190, generator).save(tmp_path / "photo.jpg")
    for command in commands.splitlines()[:2]:
        python, *words = shlex.split(command)
        result = run(words, folder=tmp_path)
        assert (python, result.returncode) == ("python", 0), result.stdout + result.stderr
    answer = result.stdout.splitlines()[-1]
    found = re.fullmatch(r"photo\.jpg: dog (\d+\.\d)%, cat \d+\.\d%", answer)
    assert found and float(found[1]) > 80, answer


def _picture(brightness: int, generator: torch.Generator) -> Image.Image:
    pixels = torch.randint(brightness - 60, brightness + 60, (24, 32, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
