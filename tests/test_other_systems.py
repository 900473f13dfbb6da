"""Windows has no fcntl, SIGUSR1, signal masks or folders to open; macOS no sigwaitinfo. Both start workers afresh."""

import pickle
import subprocess
import sys

import pytest

from config import load_config
from data import build_train_loader
from tests.helpers import DIGITS, TINY, arguments, folder
from tests.processes import ROOT, environment

# A training of one process with a data worker, then a prediction and an export, on a Python that lacks these names.
PROGRAM = """
import os, runpy, signal, sys
if sys.argv[1] == "windows":
    sys.modules["fcntl"] = None
    del signal.SIGUSR1, signal.pthread_sigmask, os.O_DIRECTORY
del signal.sigwaitinfo
import main
assert main.main(sys.argv[3:]) == 0
from tools import export, predict
best = sys.argv[2] + "/best.pth"
assert predict.main([best, sys.argv[2] + "/curves.png"]) in (0, None)
assert export.main([best, sys.argv[2] + "/network.safetensors"]) in (0, None)
"""


@pytest.mark.parametrize("system", ["windows", pytest.param("macos", marks=pytest.mark.slow)])
def test_a_training_a_prediction_and_an_export(tmp_path, system):
    options = arguments(tmp_path, "TRAIN.EPOCHS", 1, "DATA.NUM_WORKERS", 1)
    result = subprocess.run([sys.executable, "-c", PROGRAM, system, folder(tmp_path), *options], cwd=ROOT,
                            env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder(tmp_path) / "network.safetensors").exists()
    assert ("this system has no file locks" in result.stdout) == (system == "windows")


def test_what_workers_get_can_be_pickled():
    """Where they are not forked, the data set, its transforms and their start function travel to them."""
    loader = build_train_loader(load_config(DIGITS, TINY))
    dataset, start = pickle.loads(pickle.dumps((loader.dataset, loader.loader.worker_init_fn)))
    assert len(dataset) == len(loader.dataset) and start is loader.loader.worker_init_fn
