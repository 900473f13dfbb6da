"""What processes say of one that does not answer."""

import signal
import socket

import pytest

from tests.processes import Fork, run

HANG = """
import os, signal, torch, distributed
distributed._ROLL_CALL = 2
distributed.init_distributed(torch.device("cpu"), limit_minutes=0.05)
if distributed.rank() == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    distributed.agree_on_largest(3)
except RuntimeError as error:
    print(distributed.silent_processes(error))
"""


MEET = """
import torch, distributed
from models import InputError
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
