"""How a program ends on an error: with one line if the input or the machine is the cause, with a traceback on a bug."""

import contextlib
import errno
import functools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import distributed
from models import InputError

# Disks, permissions and limits, which the user can fix. Other OSErrors are bugs: problems with a path that a user names
# are turned into an InputError.
_USERS_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE,
                 errno.EMFILE, errno.ENFILE, errno.EISDIR}


class RunError(RuntimeError):
    """A run that cannot continue although its command is right: too little memory, a dead process."""


def exit_status(error: BaseException) -> int | None:
    """2 for an error that the user can fix, 1 for a run that cannot continue, None for a bug (with traceback)."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
        return 2
    return 1 if isinstance(error, (RunError, FloatingPointError)) else None


def message(error: BaseException) -> str:
    """An error's message; one from a data worker arrives with the worker's traceback and the class before it."""
    text = str(error)
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


def one_line_errors(main):
    """Makes a tool's ``main`` print an error that the user can fix as one line, ``tool.py: message``, and return 2."""
    tool = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def ending_in_one_line(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except Exception as error:
            status = exit_status(error)
            if status is None:
                raise
            print(f"{tool}: {message(error)}", file=sys.stderr)
            return status

    return ending_in_one_line


@contextlib.contextmanager
def machine_failures():
    """Turns failures of the machine into a RunError with advice.

    PyTorch reports most of them as a plain RuntimeError, which only its message tells from a bug.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
        silent = distributed.silent_processes(error)
        if silent is not None:
            cause = (f"no answer within HANG_MINUTES from {', '.join(silent)}; it hangs, or its network is down"
                     if silent else "a process answered later than HANG_MINUTES; it or its network was slow")
            raise RunError(f"{cause}. Rerun the same command to resume, or use torchrun --max-restarts") from error
        if isinstance(error, torch.OutOfMemoryError):
            advice = "Lower --batch-size and raise --accumulation-steps to compensate, or add --use-checkpoint."
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
            advice = "Lower --batch-size and raise --accumulation-steps to compensate, or lower DATA.NUM_WORKERS."
        elif "Too many open files" in text:
            advice = "Raise the limit (ulimit -n), or lower DATA.NUM_WORKERS."
        elif "DataLoader worker" in text and "Original Traceback" not in text:  # one that died
            advice = "Memory is often the reason: lower DATA.NUM_WORKERS, or cache less (--cache-mode)."
        elif isinstance(error, dist.DistError) or "gloo/transport" in text:
            advice = "Another process of this run has ended; see its error message."
        elif "deterministic" in text and torch.are_deterministic_algorithms_enabled():
            advice = "Set DETERMINISTIC False, or use a network without this operation."
        else:
            raise
        raise RunError(f"{text.splitlines()[0].rstrip('. ')}. {advice}") from error
