"""``pip install .``: models/ as the package strip_mlp, for other projects."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

WEIGHTS = ROOT / "weights/strip_mlp_nano_cifar10"

# From an empty folder: nothing of the repository but the package can be imported.
USE = """
import sys
sys.path[:] = [path for path in sys.path if path]
sys.path[:0] = sys.argv[1:]
import safetensors.torch, strip_mlp, timm, torch
assert strip_mlp.__file__.endswith({file!r}), strip_mlp.__file__
net = timm.create_model("strip_mlp_tiny_light", num_classes=3, img_size=(32, 64)).eval()
assert type(net) is strip_mlp.StripMLPNet
assert net(torch.zeros(1, 3, 32, 64)).shape == (1, 3)
trained = timm.create_model("local-dir:{weights}", pretrained=True)
stored = safetensors.torch.load_file("{weights}/model.safetensors")
assert torch.equal(trained.head.weight, stored["head.weight"].float())
for name in ("models", "engine", "config", "data"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{{name}} was installed too")
"""


@pytest.fixture
def source(tmp_path):
    """A copy to build in, so that the repository stays clean."""
    folder = tmp_path / "source"
    shutil.copytree(ROOT / "models", folder / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "main.py", "config.py", "engine.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def command(*arguments, cwd):
    variables = environment() | {"PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=variables, capture_output=True,
                            text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr


def pip_install(*arguments, cwd):
    command("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", *arguments, cwd=cwd)


def test_installed_package(source, tmp_path):
    pip_install("--target", tmp_path / "site", source, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "site").glob("[!_]*") if path.suffix != ".dist-info") == [
        "strip_mlp"]
    names = sorted(path.name for path in (tmp_path / "site" / "strip_mlp").glob("*.py"))
    assert names == sorted(path.name for path in (ROOT / "models").glob("*.py"))
    (tmp_path / "elsewhere").mkdir()
    use = USE.format(file="site/strip_mlp/__init__.py", weights=WEIGHTS)
    command("-c", use, tmp_path / "site", cwd=tmp_path / "elsewhere")


@pytest.mark.slow
def test_editable_package(source, tmp_path):
    """What is imported is models/ itself, edits included."""
    pip_install("--prefix", tmp_path / "prefix", "--editable", source, cwd=tmp_path)
    site, = (tmp_path / "prefix" / "lib").glob("python*/site-packages")
    (tmp_path / "elsewhere").mkdir()
    found = f"import site; site.addsitedir({str(site)!r})\n"
    command("-c", found + USE.format(file="source/models/__init__.py", weights=WEIGHTS), cwd=tmp_path / "elsewhere")


def test_requirements_agree():
    """What the package needs is what the repository needs."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = (ROOT / "requirements.txt").read_text().splitlines()
    for requirement in project["dependencies"]:
        assert any(line.startswith(requirement) for line in required), requirement


def test_the_versions_that_are_tested_are_those_that_are_allowed():
    """nox runs the oldest pair that the requirements take, and none beyond the newest."""
    noxfile = (ROOT / "noxfile.py").read_text()
    pairs = re.findall(r'"(\d+\.\d+)\.\d+": "(\d+\.\d+)\.\d+"', noxfile)
    text = (ROOT / "requirements.txt").read_text()
    for name, tested in zip(("torch", "torchvision"), zip(*pairs, strict=True), strict=True):
        oldest, limit = re.search(rf"^{name}>=([\d.]+),<([\d.]+)", text, re.M).groups()
        assert tested[0] == oldest
        major, minor = map(int, tested[-1].split("."))
        assert limit == f"{major}.{minor + 1}"
