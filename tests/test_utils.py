"""The process group's environment, random states, multiply-accumulates."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed
import report
import utils
from config import load_config
from models import InputError, StripMLPNet, build_model

CONFIGS = Path(__file__).parents[1] / "configs"
LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


# ---- multiply-accumulates ------------------------------------------------------------------------

@pytest.mark.parametrize("variant, giga", [("tiny_light", 2.52), ("tiny", 3.65), ("small", 6.80), ("base", 9.18)])
def test_macs_of_the_variants(variant, giga):
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / f"smlp_{variant}_alpha3_patch4_224_imagenet1k.yaml"))
    assert utils.count_macs(model, (3, 224, 224)) == pytest.approx(giga * 1e9, rel=0.01)


def test_macs_by_hand():
    """C = 8, 32x32 input, one block a stage, P = 2, 3 classes, term by term."""
    model = StripMLPNet(img_size=32, num_classes=3, embed_dim=8, depths=(1, 1, 1, 1), num_patches=2)
    total = 8 * 3 * 16 * 8 * 8 + 64 * 3  # stem, head
    for c, side in [(8, 8), (16, 4), (32, 2), (64, 1)]:
        tokens, half = side * side, c // 2
        total += tokens * (9 * c + c * c + c * c + 49 * c + 2 * 3 * c * c)  # the two blocks' own layers
        total += 2 * tokens * half * 3 * side + 2 * tokens * 2 * half * half  # CGSMM: strips, fusions
        total += 2 * tokens * 21 * half + half * (half // 2) + half // 2 * 3 * half  # LSMM
    for c, side in [(8, 4), (16, 2), (32, 1)]:
        total += side * side * 4 * c * 2 * c  # merging
    total += 2 * 2 * 32 * 4 + 2 * 64 * 4  # shortcuts
    assert utils.count_macs(model, (3, 32, 32)) == total


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training):
    torch.manual_seed(0)
    model = StripMLPNet(img_size=32, num_classes=3, embed_dim=8, depths=(1, 1, 1, 1), drop_path_rate=0.5)
    model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    utils.count_macs(model, (3, 32, 32))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


# ---- random states -------------------------------------------------------------------------------

def draw():
    return [random.random(), random.gauss(0, 1), *np.random.rand(3), np.random.normal(), *torch.randn(3).tolist()]


def test_rng_state_round_trip():
    utils.seed_everything(5)
    draw()
    random.gauss(0, 1)  # Python and NumPy hold half a pair of normal numbers now
    np.random.normal()
    file = io.BytesIO()
    torch.save(utils.get_rng_state(), file)
    expected = draw()
    assert draw() != expected
    file.seek(0)
    utils.set_rng_state(torch.load(file, weights_only=True))
    assert draw() == expected


def test_seed_everything():
    utils.seed_everything(3)
    expected = draw()
    assert draw() != expected
    utils.seed_everything(4)
    assert all(a != b for a, b in zip(draw(), expected, strict=True))
    utils.seed_everything(3)
    assert draw() == expected
    utils.seed_everything(2**40)  # beyond what NumPy takes


# ---- process group -------------------------------------------------------------------------------

@pytest.fixture
def launcher(monkeypatch):
    """Sets launcher variables, after clearing the ones that are set."""
    for name in (*LAUNCHER, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize("missing", [
    ["MASTER_ADDR"], ["LOCAL_RANK", "MASTER_PORT"], ["WORLD_SIZE"], ["RANK"],
    ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"],
])
def test_half_a_launcher(missing, launcher):
    launcher({name: value for name, value in LAUNCHER.items() if name not in missing})
    with pytest.raises(ValueError, match="environment variables are incomplete") as error:
        distributed.launcher_local_rank()
    named = str(error.value).partition(":")[2].partition(" missing")[0].replace(",", "").split()
    assert named == [name for name in LAUNCHER if name in missing]
    assert not torch.distributed.is_initialized()


def test_empty_variable_counts_as_missing(launcher):
    launcher(LAUNCHER | {"MASTER_PORT": ""})
    with pytest.raises(ValueError, match="MASTER_PORT missing"):
        distributed.launcher_local_rank()


@pytest.mark.parametrize("name, value", [
    ("RANK", "1"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "x"), ("LOCAL_WORLD_SIZE", "abc"), ("LOCAL_WORLD_SIZE", "0"),
])
def test_variables_that_are_no_such_number(launcher, name, value):
    launcher(LAUNCHER | {name: value})
    with pytest.raises(InputError, match=f"variable {name} is '{value}'; it must be a number from .*torchrun"):
        distributed.launcher_local_rank()


def test_the_number_of_local_processes_is_checked_without_a_launcher_too(launcher):
    launcher({"LOCAL_WORLD_SIZE": "abc"})
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE is 'abc'.* .WORLD_SIZE is not set"):
        distributed.launcher_local_rank()


def test_no_launcher(launcher):
    launcher({"MASTER_ADDR": "127.0.0.1"})  # alone it says nothing
    assert distributed.launcher_local_rank() == 0
    distributed.init_distributed(torch.device("cpu"))
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    assert distributed.all_reduce_sum(torch.tensor([3.0])).tolist() == [3.0]
    distributed.barrier()


def test_one_process_on_other_accelerators(launcher):
    launcher(LAUNCHER)
    with pytest.raises(InputError, match="--device mps runs as one process; start it without torchrun"):
        distributed.init_distributed(torch.device("mps"))


# ---- what a run says about itself ----------------------------------------------------------------

def test_describe_environment():
    found = report.describe_environment(torch.device("cpu"))
    assert (found["torch"], found["world_size"]) == (torch.__version__, 1)
    assert {"python", "torchvision", "timm", "git_commit", "device"} <= found.keys()
    assert all(isinstance(value, (str, int)) for value in found.values())  # YAML and JSON take them as they are
