"""The device, the process group, failures of the machine."""

import signal
import socket

import pytest
import torch

import distributed
from distributed import machine_failures
from tests.processes import Fork, run
from utils import InputError, RunError, error_message

HANG = """
import os, signal, torch, distributed
distributed._ROLL_CALL = 2
distributed.init_distributed(torch.device("cpu"), limit_minutes=0.05)
if distributed.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    distributed.gather_objects(3)
except RuntimeError as error:
    print(distributed.silent_processes(error))
"""


MEET = """
import torch, distributed
from utils import InputError, error_message
try:
    distributed.init_distributed(torch.device("cpu"), limit_minutes=0.02)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_waited_for_no_longer_than_the_limit(rank):
    launcher = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    process = run(["-c", MEET], timeout=60, RANK=rank, LOCAL_RANK=rank, **launcher)
    assert f"process {rank} cannot join the others at 127.0.0.1:" in process.stdout, process.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]  # free once more when this ends


def test_the_process_that_hangs_is_named():
    """Rank 1 is stopped; rank 0 waits three seconds for it and then asks who is there."""
    launcher = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    waiting, stopped = (Fork(["-c", HANG], RANK=rank, LOCAL_RANK=rank, **launcher) for rank in range(2))
    try:
        waiting.wait()
    finally:
        stopped.signal(signal.SIGKILL)
    *_, named = waiting.stdout.splitlines()  # some versions of gloo print before it
    assert named.startswith("['rank 1 (process ") and named.count("rank") == 1, waiting.stderr


# ---- the launcher ----------------------------------------------------------------------------------

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


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


# ---- failures --------------------------------------------------------------------------------------

@pytest.mark.parametrize("failure, advice", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore"), "Tried 2 GiB. Lower --batch-size"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x"), "or lower DATA.NUM_W"),
    (MemoryError(), "MemoryError. Lower --batch-size"),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "lower DATA.NUM_WORKERS"),
    (RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "Another process of this run"),
    (torch.distributed.DistBackendError("NCCL error"), "Another process of this run"),
])
def test_failures_of_the_machine_say_what_helps(failure, advice):
    with pytest.raises(RunError) as raised, machine_failures():
        raise failure
    assert advice in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("silent, message", [
    (["rank 1 (process 7 on a)"], r"no answer within HANG_MINUTES from rank 1 \(process 7 on a\); it hangs, or its"),
    ([], "^a process answered later than HANG_MINUTES; it or its network was slow. Rerun the same command"),
])
def test_a_process_that_answers_late_is_not_said_to_hang(silent, message, monkeypatch):
    monkeypatch.setattr(distributed, "silent_processes", lambda error: silent)
    with pytest.raises(RunError, match=message), machine_failures():
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")


def test_what_a_worker_raises_is_no_failure_of_the_machine():
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nx"
    with pytest.raises(RuntimeError) as raised, machine_failures():
        raise RuntimeError(text)
    assert type(raised.value) is RuntimeError
    assert error_message(InputError("Original Traceback\n  ...\nutils.InputError: a.png is empty")) == (
        "a.png is empty")


def test_one_value_per_channel_says_what_helps_and_other_value_errors_stay():
    norm = torch.nn.BatchNorm2d(4)
    with pytest.raises(RunError, match="BatchNorm needs more: raise --batch-size"), machine_failures():
        norm(torch.zeros(1, 4, 1, 1))
    with pytest.raises(InputError, match="^the download timed out$"), machine_failures():
        raise InputError("the download timed out")
