"""What processes say of one that does not answer."""

import signal
import socket

from tests.processes import Fork

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


def test_the_process_that_hangs_is_named():
    """Rank 1 is stopped; rank 0 waits three seconds for it and then asks who is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]  # free once more when this ends
    launcher = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    waiting, stopped = (Fork(["-c", HANG], RANK=rank, LOCAL_RANK=rank, **launcher) for rank in range(2))
    try:
        waiting.wait()
    finally:
        stopped.signal(signal.SIGKILL)
    *_, named = waiting.stdout.splitlines()  # some versions of gloo print before it
    assert named.startswith("rank 1 (process ") and named.count("rank") == 1, waiting.stderr
