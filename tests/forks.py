"""Runs Python commands, each in a fork of this process, which has imported PyTorch already.

``tests/processes.py`` starts it and talks to it. A request is a line of JSON on standard input; its answer is a line of
JSON on standard output:

    {"command": ["main.py", ...], "variables": {...}, "folder": ..., "stdout": ..., "stderr": ...} -> the fork's pid
    {"wait": pid, "block": true} -> its exit status, minus the number of the signal that ended it; null while it runs
"""

import gc
import json
import os
import random
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.distributed.launcher  # noqa: F401  what torchrun imports

import logger
import main  # noqa: F401


def serve(requests, answers) -> dict:
    """Answers requests until there are no more. In each fork it returns the request that the fork is for."""
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), file=answers, flush=True)
    sys.exit()


def run(command, variables, folder, stdout, stderr) -> None:
    """Does what ``python COMMAND`` does: a script, ``-m`` and a module, or ``-c`` and a program, with its arguments."""
    os.setsid()
    for number, path in enumerate((os.devnull, stdout, stderr)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for seed in (random.seed, np.random.seed, torch.seed):  # or every fork would draw the same numbers unseeded
        seed()
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def forget_the_launcher() -> None:
    """Gives back the signals that torchrun handles: its processes are programs of their own elsewhere, not forks."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if getattr(signal.getsignal(number), "__module__", "").startswith("torch.distributed.elastic"):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if __name__ == "__main__":
    os.register_at_fork(after_in_child=forget_the_launcher)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    logger.draw_curves = lambda folder: None  # matplotlib would take half of the time of a tiny training
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads; a fork would only have one of them"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()  # a fork would copy every page that the collector touches, at its end above all
    request = serve(sys.stdin, answers)
    answers.close()
    run(**request)
