"""Launching the runs of a table: which commands, which are skipped, what a failure or a signal does."""

import json
import os
import shlex
import signal
import sys
import threading
import time

import pytest
import yaml

from config import load_config, to_dict
from tests.helpers import DIGITS, TINY, another_run
from tests.processes import ROOT, run
from tools import reproduce
from tools.tables import TABLES, read_tables


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The launcher on a tiny table of two networks; ``launch(*flags)`` gives the status and the commands of main.py."""
    rows = {
        "first": {"name": "A", "config": DIGITS.stem, "opts": TINY},
        "second": {"name": "B", "config": DIGITS.stem, "opts": [*TINY, "MODEL.STRIP_MLP.STRIP_WIDTH", 1]},
    }
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump({"tiny": {"title": "tiny", "rows": rows}}))
    monkeypatch.chdir(ROOT)

    def launch(*flags, outcome=(0, False)):
        commands = []
        monkeypatch.setattr(reproduce, "run", lambda command: commands.append(command) or outcome)
        return reproduce.main(["tiny", "--tables", str(path), "--output", str(tmp_path), *flags]), commands

    launch.file = path
    return launch


def options(command):
    """{flag: value} of a command, and the last value of each config key in --opts."""
    at = command.index("--opts")
    pairs = command[command.index("--cfg"):at], command[at + 1:]
    return {key: value for part in pairs for key, value in zip(part[::2], part[1::2], strict=True)}


def finish(folder, epochs=2, last=""):
    folder.mkdir(parents=True)
    records = [{"kind": "eval", "step": 7 * (i + 1), "epoch": i, "epochs": i + 1, "acc1": 50.0, "loss": 1.0}
               for i in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + last)


def test_commands_of_a_table(table, tmp_path):
    status, commands = table("--seeds", "2", "--data-path", "DIR", "--opts", "TRAIN.EPOCHS", "5", "SEED", "9")
    assert status == 0
    found = [options(command) for command in commands]
    assert [(o["--output"], o["--tag"], o["SEED"]) for o in found] == [
        (str(tmp_path / row), f"seed{seed}", str(seed)) for seed in (0, 1) for row in ("first", "second")
    ]
    for command, o in zip(commands, found, strict=True):
        assert command[:2] == [sys.executable, "main.py"] and not os.path.isabs(o["--cfg"])
        assert (o["--data-path"], o["TRAIN.EPOCHS"], o["MODEL.STRIP_MLP.EMBED_DIM"]) == ("DIR", "5", "8")
        assert o.get("MODEL.STRIP_MLP.STRIP_WIDTH") == ("1" if "second" in o["--output"] else None)


def test_launchers(table):
    _, (command,) = table("--rows", "second", "--nproc", "8")
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8", "main.py"]
    assert "second" in options(command)["--output"]


def test_slurm(table, tmp_path, monkeypatch, capsys):
    """Jobs that wait in the queue are not submitted again; stand-ins for SLURM's own commands."""
    queue, path = tmp_path / "queue", tmp_path / "squeue"
    path.write_text(f'#!/bin/bash\ncat "{queue}"\n')
    path.chmod(0o755)
    queue.write_text("first_seed0\nother\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, (command,) = table("--slurm", "--nodes 2 --gpus-per-node 8")
    assert command[:8] == [
        "sbatch", "--job-name", "second_seed0", "--nodes", "2", "--gpus-per-node", "8", "tools/slurm_train.sh",
    ]
    assert (ROOT / command[7]).is_file()
    monkeypatch.chdir(tmp_path)
    assert table("--slurm", "")[0] == 2
    monkeypatch.chdir(ROOT)
    path.unlink()
    assert table("--slurm", "")[0] == 2
    assert "there is no squeue here" in capsys.readouterr().err


def test_finished_runs_are_skipped(table, tmp_path, capsys):
    finish(tmp_path / "first" / DIGITS.stem / "seed0")
    finish(tmp_path / "second" / DIGITS.stem / "seed0", epochs=1, last='{"kind": "eval", "epo')  # was killed
    _, (command,) = table()
    assert "second" in options(command)["--output"]
    assert "first_seed0: finished" in capsys.readouterr().out
    assert len(table("--opts", "TRAIN.EPOCHS", "3")[1]) == 2  # not finished by this schedule


def test_a_damaged_run_is_named(table, tmp_path, capsys):
    finish(tmp_path / "first" / DIGITS.stem / "seed0", last="not a record\n")
    assert table() == (2, [])
    assert "metrics.jsonl is damaged: line 3 is not a record" in capsys.readouterr().err


def test_runs_in_progress_are_left_to_whoever_runs_them(table, tmp_path, capsys):
    folder = tmp_path / "first" / DIGITS.stem / "seed0"
    folder.mkdir(parents=True)
    with another_run(folder):
        _, (command,) = table()
        assert "second" in options(command)["--output"]
        assert "first_seed0: in progress elsewhere" in capsys.readouterr().out
    assert len(table()[1]) == 2


def test_what_a_failure_does(table, capsys):
    status, commands = table(outcome=(1, False))  # a training that failed: the others go on
    assert (status, len(commands)) == (1, 2)
    assert "second_seed0: exit status 1" in capsys.readouterr().err
    status, commands = table(outcome=(2, False))  # bad input, the same for all
    assert (status, len(commands)) == (2, 1)
    status, commands = table(outcome=(75, True))  # a signal came
    assert (status, len(commands)) == (75, 1)


@pytest.mark.parametrize("flags, message", [
    (["--rows", "frist"], "there is no row frist; did you mean first?; there are first, second"),
    (["--seeds", "0"], "--seeds 0 and --nproc 1 must be at least 1"),
    (["--opts", "TRAIN.EPOCH", "3"], "unknown config key TRAIN.EPOCH; did you mean TRAIN.EPOCHS?"),
])
def test_bad_input(table, capsys, flags, message):
    status, commands = table(*flags)
    assert (status, commands) == (2, [])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--tag=x", "--cfg", "--eval", "--resume=x", "--throughput"])
def test_flags_of_a_single_run_are_refused_and_not_in_the_help(table, capsys, flag):
    for words, status in (([flag], 2), (["--help"], 0)):
        with pytest.raises(SystemExit, match=str(status)):
            table(*words)
    out, err = capsys.readouterr()
    name = flag.partition("=")[0]
    assert f"{name} is for a single run, with main.py" in err
    assert name not in out.split() and "--accumulation-steps N" in out and "--output DIR" in out


def test_a_flag_s_value_before_the_table_is_not_the_table(table, tmp_path, capsys):
    argv = ["--data-path", "DIR", "tiny", "--tables", str(table.file), "--output", str(tmp_path), "--dry-run"]
    assert reproduce.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(" --data-path DIR " in line for line in lines)


def test_a_run_of_other_settings_is_not_taken_for_this_one(table, tmp_path, capsys):
    row = read_tables(table.file)["tiny"][1][0]
    folder = tmp_path / "first" / DIGITS.stem / "seed0"
    finish(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(row.config())))
    assert len(table()[1]) == 1
    assert table("--opts", "TRAIN.BASE_LR", "0.01") == (2, [])
    error = capsys.readouterr().err
    assert f"{folder} holds a run with other settings: TRAIN.BASE_LR 0.002 -> 0.01; choose another --output" in error


def test_unknown_flags_and_tables_are_errors(table, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        table("--data-pth", "DIR")
    assert "unknown argument --data-pth; did you mean --data-path?" in capsys.readouterr().err
    assert reproduce.main(["cifar", "--dry-run"]) == 2
    assert "there is no table cifar; did you mean cifar10?; there are imagenet1k, " in capsys.readouterr().err
    for text, message in (("[1, 2]", "is not a file of tables like tools/tables.yaml"),
                          ("tiny: {rows: {a: {}}}", "is not a file of tables like tools/tables.yaml"),
                          ("tiny: {title: a, rows: {a: {}}}", "is not a file of tables like tools/tables.yaml"),
                          ("tiny: {title: a, row: {}}", "tables.yaml: tiny: unknown key row; did you mean rows?"),
                          ("tiny: {title: a, opts: [], rows: {}}", "tiny: unknown key opts; it belongs into a row"),
                          ("tiny: {title: a, rows: {a: {name: b, opt: []}}}",
                           "tables.yaml: tiny: a: unknown key opt; did you mean opts?"),
                          ("{", "is not YAML")):
        table.file.write_text(text)
        assert table()[0] == 2
        assert message in capsys.readouterr().err


def test_signals_reach_the_run(tmp_path):
    """The run is told, and the launcher says that it was."""
    ready = tmp_path / "ready"
    program = ("import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75)); "
               f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)")

    def send():
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    assert reproduce.run([sys.executable, "-c", program]) == (75, True)
    assert signal.getsignal(signal.SIGTERM) is before
    assert reproduce.run([sys.executable, "-c", "raise SystemExit(3)"]) == (3, False)


def test_every_row_of_the_tables_has_a_config_that_loads():
    for _, rows in read_tables(TABLES).values():
        assert [row for row in rows if row.path]
        for row in rows:
            if row.path:
                row.config()
    rows = [row for _, rows in read_tables(TABLES).values() for row in rows]
    networks = {(row.key, row.path, row.opts) for row in rows}
    assert len(networks) == len({row.key for row in rows})  # a key names one output folder


def test_a_table_is_run_and_not_again(table, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(reproduce, "run", lambda command: (run(command[1:]).returncode, False))
    command = ["tiny", "--tables", str(table.file), "--output", str(tmp_path), "--rows", "first", "--device", "cpu",
               "--opts", "TRAIN.EPOCHS", "1", "DATA.BATCH_SIZE", "200"]
    assert reproduce.main(command) == 0
    output = capfd.readouterr().out
    folder = tmp_path / "first" / DIGITS.stem / "seed0"
    config = load_config(folder / "config.yaml")
    assert (config.SEED, config.MODEL.STRIP_MLP.EMBED_DIM) == (0, 8)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "eval_ema"
    assert shlex.split(output.splitlines()[0].partition(": ")[2])[1] == "main.py"
    assert reproduce.main(command) == 0
    assert capfd.readouterr().out == f"first_seed0: finished, see {folder}\n"
