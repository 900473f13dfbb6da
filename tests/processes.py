"""Commands in processes of their own: forks that have PyTorch already, or fresh interpreters, which import it first.

A fork starts in a tenth of a second, an interpreter in six. The forks serve wherever a test is about what a process
does; a fresh interpreter is for what comes before ``main.py`` runs.
"""

import contextlib
import functools
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKING = ("--start-method", "fork", "--run-path")  # flags that have torchrun start its processes as forks
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def environment(**variables) -> dict[str, str]:
    """The environment of a child process: two threads would make two processes on two cores crawl."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in variables.items()}


def torchrun(processes: int, *flags) -> list:
    """The beginning of a command that starts so many processes by PyTorch's launcher, which forks, too."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *FORKING, *flags]


class _Server:
    """The process that forks, see ``tests/forks.py``."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, ROOT / "tests" / "forks.py"], text=True, env=environment(),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.outputs = tempfile.TemporaryDirectory()
        self.numbers = itertools.count()

    def new_file(self, suffix: str) -> str:
        return f"{self.outputs.name}/{next(self.numbers)}.{suffix}"

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def answer(self, timeout: float | None = None):
        """The answer to what was asked, or TimeoutError."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError
        return json.loads(self.process.stdout.readline())


_server = functools.cache(_Server)


class Fork:
    """A command that runs in a session of its own. ``stdout`` and ``stderr`` are what it has written so far."""

    def __init__(self, command, folder=ROOT, merge=False, **variables):
        self.server, self.command = _server(), [str(word) for word in command]
        self._stdout = self.server.new_file("stdout")
        self._stderr = self._stdout if merge else self.server.new_file("stderr")
        self.server.ask(command=self.command, variables=environment(**variables), folder=str(folder),
                        stdout=self._stdout, stderr=self._stderr)
        self.pid, self.returncode = self.server.answer(), None

    @property
    def stdout(self) -> str:
        return self._read(self._stdout)

    @property
    def stderr(self) -> str:
        return self._read(self._stderr)

    @staticmethod
    def _read(path: str) -> str:
        with contextlib.suppress(FileNotFoundError):  # it has hardly begun
            return Path(path).read_text(errors="replace")
        return ""

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            self.server.ask(wait=self.pid, block=False)
            self.returncode = self.server.answer()
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """Its exit status, minus the signal's number if one ended it; kills it and fails after ``timeout`` seconds."""
        if self.returncode is None:
            self.server.ask(wait=self.pid, block=True)
            try:
                self.returncode = self.server.answer(timeout)
            except TimeoutError:
                self.kill()
                self.returncode = self.server.answer()
                raise AssertionError(f"{self.command} took over {timeout} s:\n{self.stdout}\n{self.stderr}") from None
        return self.returncode

    def signal(self, number: int) -> None:
        """Sends a signal to the command alone."""
        os.kill(self.pid, number)

    def signal_all(self, number: int) -> None:
        """Sends a signal to the command and its children, as a terminal does."""
        os.killpg(self.pid, number)

    def kill(self) -> None:
        """Ends whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            self.signal_all(signal.SIGKILL)

    def living(self) -> list[int]:
        """The processes of its session that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.pid and state not in "ZX":
                    found.append(int(path.parent.name))
        return found


def wait_for(condition, process: Fork, timeout: float = 120) -> None:
    """Waits until ``condition()`` is true; fails if the process ends before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout + process.stderr
        time.sleep(0.05)


def run(command, timeout=120, **variables) -> Fork:
    """Runs a command in a fork, in the repository, to its end."""
    process = Fork(command, **variables)
    process.wait(timeout)
    return process


def run_interpreter(command, timeout=240, **variables) -> subprocess.CompletedProcess:
    """Runs a command in an interpreter of its own, as a shell does."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment(**variables),
                          capture_output=True, text=True, timeout=timeout)
