"""Every command of the repository: what ``--help`` says, and that it starts wherever it is called from."""

import argparse
import re
import runpy
import sys

import pytest

from tests.processes import ROOT, run_interpreter

SCRIPTS = sorted(path for folder in (ROOT, ROOT / "tools") for path in folder.glob("*.py")
                 if re.search(r"parse_arg\w*\(.*^if __name__", path.read_text(), re.M | re.S))
TOOLS = [path for path in SCRIPTS if path.parent.name == "tools"]


def parser_of(script, monkeypatch):
    """The command line's parser, caught when the script is about to use it."""
    class Caught(Exception):
        pass

    def catch(parser, *args, **kwargs):
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)  # which parse_args calls too
    monkeypatch.setattr(sys, "argv", [script.name])
    with pytest.raises(Caught) as caught:
        runpy.run_path(str(script), run_name="__main__")
    return caught.value.args[0]


def test_all_scripts_are_found():
    assert {"main.py", "split_caltech101.py", "predict.py", "export.py"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help(script, monkeypatch):
    """It says in a sentence what the command does, shows a whole command line, and explains every argument."""
    parser = parser_of(script, monkeypatch)
    first, _, rest = parser.description.partition("\n")
    assert first.endswith((".", ":")) or not rest.startswith("\n") and "." in rest
    assert f"    python {script.relative_to(ROOT)} " in parser.description
    parser.prog = script.name
    parser.format_help()  # a stray % would fail here
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert [action.dest for action in actions if not action.help] == []
    options = [action for action in actions if action.option_strings and action.nargs != 0]
    unnamed = [action.dest for action in options if not (action.metavar or action.choices)]
    assert unnamed == []  # else the help shows the variable's name for the value


@pytest.mark.parametrize("script", TOOLS, ids=lambda path: path.name)
def test_tools_find_the_repository_from_anywhere(script):
    text = script.read_text()
    modules = {path.stem for path in ROOT.glob("*.py")} | {"models", "data"}
    imports = [line for line in text.splitlines() if line.startswith(("from ", "import "))]
    if any(line.split()[1].partition(".")[0] in modules for line in imports):
        assert text.count("sys.path.insert(0, str(") == 1


def test_a_tool_starts_from_anywhere(tmp_path):
    command = f"import os, runpy, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['predict.py', '--help']; " \
              f"sys.path[0] = {str(ROOT / 'tools')!r}; runpy.run_path({str(ROOT / 'tools/predict.py')!r}, " \
              "run_name='__main__')"
    result = run_interpreter(["-c", command], PYTHONPATH="")
    assert result.returncode == 0 and result.stdout.startswith("usage: predict.py"), result.stderr
