import runpy
import sys

import pytest
import torch

import models

CHECK = models._torchvision.__file__


@pytest.mark.parametrize("fault", [
    'RuntimeError("operator torchvision::nms does not exist")', 'OSError("undefined symbol: _ZN3c10")',
])
def test_a_torchvision_of_another_pytorch(tmp_path, monkeypatch, fault):
    (tmp_path / "torchvision.py").write_text(f"raise {fault}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    fitting = f"0.{int(torch.__version__.split('.')[1]) + 15}"
    with pytest.raises(ImportError, match=rf"does not fit PyTorch .*; run: pip install 'torchvision=={fitting}\.\*'"):
        runpy.run_path(CHECK)


def test_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError):
        runpy.run_path(CHECK)
