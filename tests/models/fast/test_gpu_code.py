"""The Triton kernels compiled to the machine code of GPUs, of which none is needed."""

import json
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4),
                                reason="Triton's compiler is called otherwise before 3.4")
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB


def compile_for(target, folder, *flags):
    """The reports of ``gpu_code.py``."""
    variables = environment(TRITON_CACHE_DIR=folder)
    variables.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-m", "tests.models.fast.gpu_code", target, *flags], env=variables, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(reports, target):
    """Tensor cores multiply strips. The smallest blocks fit into shared memory and spill 32 bytes a thread at most;
    larger ones are for where they are faster. Of columns, a warp's threads load neighbouring lines, one each, but in
    blocks of as many lines as tokens: those lie as the weight does, since Triton has one layout for each shape.
    """
    for kernel in reports["strip"] + reports["longest"]:
        assert kernel["has_tensor_cores"], kernel
    for kernel in [kernel for kernel in reports["strip"] if kernel["is_smallest"]]:
        assert kernel["spilled"] <= 32, kernel
        assert kernel["shared"] <= 1024 * SHARED[target], kernel
    for kernel in reports["longest"]:
        assert kernel["shared"] <= 1024 * SHARED[target], kernel
    for kernel in reports["strip"]:
        if target.startswith("sm_") and kernel["axis"] == "column" and not kernel["is_square"]:
            assert "sizePerThread = [1, 1], threadsPerWarp = [1, 32]" in kernel["loads"], kernel
            assert not any(re.match(r"sizePerThread = \[[2-9]", load) for load in kernel["loads"]), kernel


def test_compiles(tmp_path):
    reports = compile_for("sm_90", tmp_path)
    assert [len(kernels) for kernels in reports.values()] == [2, 0]
    check(reports, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
def test_compiles_at_all_lengths_in_all_blocks(target, tmp_path):
    reports = compile_for(target, tmp_path, "--all")
    assert [len(kernels) for kernels in reports.values()] == [64, 4 * target.startswith("sm_")]
    check(reports, target)
