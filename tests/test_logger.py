"""Console and log file."""

import io
import logging
import shlex
import subprocess
import sys

import pytest

from logger import open_log, setup_console
from tests.processes import ROOT, environment

logger = logging.getLogger("strip_mlp")


pytestmark = pytest.mark.usefixtures("log_handlers")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, variables, coloured", [
    (Terminal(), {}, True), (Terminal(), {"NO_COLOR": "1"}, False), (io.StringIO(), {}, False)])
def test_colours_are_for_terminals(tmp_path, monkeypatch, stream, variables, coloured):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    setup_console(is_first=True)
    open_log(tmp_path)
    logger.info("plain")
    logger.warning("careful")
    logger.debug("for the file")
    shown, written = stream.getvalue(), (tmp_path / "log_rank0.txt").read_text()
    assert ("\x1b[" in shown) == coloured and "\x1b[" not in written
    assert "plain" in shown and "for the file" not in shown
    lines = written.splitlines()
    assert [line[22:] for line in lines] == ["plain", "WARNING: careful", "for the file"]
    assert all(line[0] == "[" and line[20:22] == "] " for line in lines)


def test_a_job_s_output_file_shows_each_line_at_once(tmp_path, monkeypatch):
    with open(tmp_path / "job.out", "w") as stream:  # buffered, as standard output is when it is no terminal
        monkeypatch.setattr(sys, "stdout", stream)
        setup_console(is_first=True)
        logger.info("started")
        assert (tmp_path / "job.out").read_text().endswith("] started\n")


def test_a_console_that_nobody_reads_any_more_ends_without_a_word(tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    setup_console(is_first=True)
    open_log(tmp_path)
    logger.info("one")
    logger.info("two")
    assert len((tmp_path / "log_rank0.txt").read_text().splitlines()) == 2 and not capsys.readouterr().err


CLOSED = """
import os, sys
from pathlib import Path
from logger import logger, open_log, setup_console
setup_console(is_first=True)
opened = open(sys.argv[1] + "/checkpoint", "w")
assert opened.fileno() > 2, "a file took the number of a standard stream"
print("to standard error", file=sys.stderr)
os.write(2, b"from a library")
open_log(Path(sys.argv[1]))
logger.info("a line")
"""


def test_closed_standard_streams(tmp_path):
    """Else sys.stderr is None, and the next file to be opened gets what libraries print there."""
    command = [sys.executable, "-c", CLOSED, str(tmp_path)]
    close = "exec 0<&- 1>&- 2>&-; exec " + shlex.join(command)
    assert subprocess.run(["sh", "-c", close], cwd=ROOT, env=environment()).returncode == 0
    assert "a line" in (tmp_path / "log_rank0.txt").read_text()
    assert (tmp_path / "checkpoint").read_text() == ""


def test_names_cannot_command_the_terminal(tmp_path):
    setup_console(is_first=True)
    open_log(tmp_path)
    logger.info("class %s", "\x1b[31mred\x07")
    assert r"class \x1b[31mred\x07" in (tmp_path / "log_rank0.txt").read_text()
