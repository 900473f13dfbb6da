"""docs/extending.md: its changes apply, one and all, and train together."""

import re
import shutil
import subprocess
import sys

import pytest

from config import load_config
from models import build_model
from tests.helpers import DIGITS, TINY
from tests.processes import ROOT, environment

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TRAIN_AND_EVALUATE = """
import sys, main
assert main.main(sys.argv[1:]) == 0
sys.exit(main.main(["--eval", *sys.argv[1:]]))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the code with the changes of the page."""
    folder = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".*", "tests", "docs", "output", "shared", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    changes = re.findall(r"^```diff\n(.*?)^```", PAGE, re.S | re.M)
    assert len(changes) == 3
    for change in changes:
        subprocess.run(["git", "apply", "--unidiff-zero"], cwd=folder, input=change, text=True, check=True)
    return folder


def test_the_changes_train_together(copy):
    options = [*TINY, "DATA.DATASET", "stripes", "DATA.DATA_PATH", ".", "MODEL.NUM_CLASSES", "2", "TRAIN.EPOCHS", "1",
               "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.OPTIMIZER.NAME", "signsgd", "TRAIN.BASE_LR", "3e-4"]
    argv = ["--cfg", str(DIGITS.relative_to(ROOT)), "--device", "cpu", "--opts", *options]
    result = subprocess.run([sys.executable, "-c", TRAIN_AND_EVALUATE, *argv], cwd=copy, text=True, capture_output=True,
                            env=environment(PYTHONPATH=copy), timeout=300)
    assert "Best top-1" in result.stdout and "training_images: 200" in result.stdout, result.stdout + result.stderr
    assert result.returncode == 0 and "eval: top-1" in result.stdout, result.stdout + result.stderr


def test_the_baseline_is_a_network(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.S | re.M)
    (tmp_path / "mine.yaml").write_text(text.replace("../datasets", str(ROOT / "configs" / "datasets")))
    assert type(build_model(load_config(tmp_path / "mine.yaml"))).__name__ == "ConvNeXt"


def test_the_token_mixer_is_one():
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    names = {}
    exec(program, names)
    assert all(parameter.grad is not None for parameter in names["net"].parameters())
    assert sum(isinstance(module, names["Pooling"]) for module in names["net"].modules()) == 4
