"""Every command of the repository: what ``--help`` says, and that it starts wherever it is called from."""

import argparse
import re
import runpy
import sys

import pytest

from tests.processes import ROOT, run_interpreter

SCRIPTS = sorted(path for pattern in ("*.py", "tools/**/*.py", "examples/*.py") for path in ROOT.glob(pattern)
                 if re.search(r"parse_arg\w*\(.*^if __name__", path.read_text(), re.M | re.S))
TOOLS = [path for path in SCRIPTS if path.parent != ROOT]


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
    found = {path.name for path in SCRIPTS}
    assert {"main.py", "split_caltech101.py", "predict.py", "export.py", "roofline.py", "detection.py"} <= found


def test_one_name_for_one_thing(monkeypatch):
    """A data set's folder, initial weights, where results go, a drawing: the same flags in every command."""
    flags = {flag: path.name for path in SCRIPTS for action in parser_of(path, monkeypatch)._actions
             for flag in action.option_strings}
    assert not {"--data", "--dir", "--root", "--weights", "--write", "--out", "--plot"} & flags.keys()
    for path in SCRIPTS:
        for action in parser_of(path, monkeypatch)._actions:
            kinds = {"--output": "DIR", "--data-path": "DIR", "--pretrained": "CKPT", "--figure": "FILE"}
            assert all(kinds.get(flag, action.metavar) == action.metavar for flag in action.option_strings), path


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
def test_help_does_not_wait_for_pytorch(script):
    """It parses before its slow imports, so that --help takes no seconds."""
    command = ("import runpy, sys; sys.argv = sys.argv[1:] + ['--help']\ntry: runpy.run_path(sys.argv[0], "
               "run_name='__main__')\nfinally: print(*{'torch', 'timm', 'numpy', 'matplotlib'} & sys.modules.keys(), "
               "file=sys.stderr)")
    result = run_interpreter(["-c", command, script])
    assert (result.returncode, result.stderr.strip()) == (0, "") and result.stdout.startswith("usage: ")


@pytest.mark.parametrize("script", TOOLS, ids=lambda path: path.name)
def test_tools_find_the_repository_from_anywhere(script):
    text = script.read_text()
    depth = len(script.relative_to(ROOT).parts) - 1
    assert f"Path(__file__).resolve().parents[{depth}]" in text and text.count("sys.path") == 1


def test_a_tool_starts_from_anywhere(tmp_path):
    command = f"import os, runpy, sys; os.chdir({str(tmp_path)!r}); sys.argv = ['predict.py', '--help']; " \
              f"sys.path[0] = {str(ROOT / 'tools')!r}; runpy.run_path({str(ROOT / 'tools/predict.py')!r}, " \
              "run_name='__main__')"
    result = run_interpreter(["-c", command], PYTHONPATH="")
    assert result.returncode == 0 and result.stdout.startswith("usage: predict.py"), result.stderr
