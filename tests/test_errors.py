"""Which errors end in one line and which show their traceback."""

import errno

import pytest
import torch

import errors
import main
from errors import RunError, exit_status, machine_failures, one_line_errors
from models import InputError, MissingFileError
from tests.helpers import arguments


@pytest.mark.parametrize("error, status", [
    (InputError("a"), 2),
    (MissingFileError("a"), 2),
    (OSError(errno.ENOSPC, "No space left on device"), 2),
    (PermissionError(errno.EACCES, "Permission denied"), 2),
    (OSError(errno.EIO, "Input/output error"), 2),
    (RunError("a"), 1),
    (FloatingPointError("a"), 1),
    (OSError("a"), None),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), None),
    (KeyError("a"), None),
    (RuntimeError("a"), None),
])
def test_exit_status(error, status):
    assert exit_status(error) == status


def test_a_tool_ends_in_one_line_or_with_its_traceback(capsys):
    @one_line_errors
    def tool(argv):
        raise argv

    assert tool(InputError("x.yaml: wrong")) == 2
    assert capsys.readouterr().err == "test_errors.py: x.yaml: wrong\n"
    with pytest.raises(KeyError):
        tool(KeyError("a bug"))


@pytest.mark.parametrize("bug", [KeyError("a"), RuntimeError("a bug of words: out of memory"), TypeError("a")])
def test_a_bug_in_a_run_shows_its_traceback(bug, tmp_path, monkeypatch):
    def fail(*args):
        raise bug

    monkeypatch.setattr(main, "build_model", fail)
    with pytest.raises(type(bug)):
        main.main(arguments(tmp_path))


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
    monkeypatch.setattr(errors.distributed, "silent_processes", lambda error: silent)
    with pytest.raises(RunError, match=message), machine_failures():
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")


def test_what_a_worker_raises_is_no_failure_of_the_machine():
    text = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nx"
    with pytest.raises(RuntimeError) as raised, machine_failures():
        raise RuntimeError(text)
    assert type(raised.value) is RuntimeError
    assert errors.message(InputError("Original Traceback\n  ...\nmodels.errors.InputError: a.png is empty")) == (
        "a.png is empty")
