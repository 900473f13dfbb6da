"""metrics.jsonl and Weights & Biases: with a stand-in for the module, and with the module itself, offline."""

import json
import logging
import os
import struct
import sys
import types

import pytest

import main
from config import load_config
from logger import open_log
from metrics import MetricsWriter
from tests.helpers import arguments, folder
from tests.processes import run

logger = logging.getLogger("strip_mlp")


pytestmark = pytest.mark.usefixtures("log_handlers")


ODD_LINES = [b'{"a":1}', b"3", b"\xff", b"", b"null", b"[" * 10_000, b'{"kind": "train", "epochs": "1"}', b"9" * 10_000,
             b'{"kind": 3, "step": 1, "epoch": 0, "epochs": 0.5}', b'{"kind": "train", "step": 1, "epoch": 0, "epo']


def test_lines_that_are_no_records_are_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    writer = MetricsWriter(tmp_path, 0.0, 0)
    for step in (1, 2):
        writer.write("train", step, 0, step / 4, loss=0.5, lr=0.1)
    writer.close()
    path = tmp_path / "metrics.jsonl"
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([good[0], *ODD_LINES, good[1]]) + b"\n")
    MetricsWriter(tmp_path, 0.25, 1).close()
    assert path.read_bytes() == good[0] + b"\n"  # the other good one is of a later update
    assert f"skipped {len(ODD_LINES)} lines that are not records of a run, the first of them line 2" in caplog.text


def test_a_pipe_in_the_place_of_the_metrics_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    MetricsWriter(tmp_path, 0.0, 0).close()
    assert (tmp_path / "metrics.jsonl").is_file()


class StandIn(types.ModuleType):
    """The few names of wandb that are used; keeps what they are called with, and can fail."""

    def __init__(self, fails_after=10**9):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.starts, self.logged, self.finished, self.fails_after = [], [], 0, fails_after

    def Settings(self, **settings):
        return settings

    def init(self, **arguments):
        self.starts.append(arguments)
        return self

    def log(self, figures, step):
        if len(self.logged) == self.fails_after:
            raise self.errors.Error("the service went away")
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1


def records(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def by_kind(run_folder):
    """The records of ``metrics.jsonl`` as they are logged: (step, {kind/figure: value})."""
    return [(record["step"], {f"{record['kind']}/{name}": value for name, value in record.items()
                              if name not in ("kind", "step", "epoch", "epochs")}) for record in records(run_folder)]


def test_every_figure_is_logged_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 1, "WANDB_PROJECT", "strips")) == 0
    first = by_kind(folder(tmp_path))
    assert wandb.logged == first and wandb.finished == 1
    longer = arguments(tmp_path, "TRAIN.EPOCHS", 2, "WANDB_PROJECT", "strips", flags=["--allow-changes"])
    assert main.main(longer) == 0
    assert wandb.logged == by_kind(folder(tmp_path)) and len(wandb.logged) > len(first) and wandb.finished == 2
    one, two = wandb.starts
    assert one["id"] == two["id"] == (folder(tmp_path) / "wandb_id.txt").read_text().strip()
    assert one["project"] == "strips" and one["resume"] == "allow" and one["dir"] == str(folder(tmp_path))
    assert one["name"].endswith("digits/run") and one["config"]["TRAIN"]["EPOCHS"] == 1


def test_a_failure_on_the_way_is_said_once_and_stops_nothing(tmp_path):
    wandb = StandIn(fails_after=1)
    logger.handlers = []  # nothing of another run that waits for its log
    open_log(tmp_path)
    metrics = MetricsWriter(tmp_path, epochs=0, step=0, wandb_run=wandb)
    for step in (1, 2, 3):
        metrics.write("train", step, 0, step / 9, loss=0.5, lr=0.1)
    metrics.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3] and len(wandb.logged) == 1
    assert (tmp_path / "log_rank0.txt").read_text()[22:] == (
        "ERROR: cannot write Weights & Biases' log: the service went away; the run continues\n")


def test_without_the_module_nothing_is_trained(tmp_path, monkeypatch, capsys):
    assert load_config().WANDB_PROJECT == ""  # off by default
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main.main(arguments(tmp_path, "WANDB_PROJECT", "strips")) == 2
    message, = [line for line in capsys.readouterr().out.splitlines() if "ERROR" in line]
    assert "WANDB_PROJECT is 'strips' but wandb is not installed" in message and "pip install wandb" in message
    assert not list(folder(tmp_path).glob("*.pth"))


def test_a_start_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    wandb = StandIn()
    wandb.init = lambda **_: (_ for _ in ()).throw(wandb.errors.Error("No API key configured."))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert main.main(arguments(tmp_path, "WANDB_PROJECT", "strips")) == 2
    assert "Weights & Biases cannot start: No API key configured; or set WANDB_MODE=offline" in capsys.readouterr().out


def offline_records(path):
    """The records of a ``.wandb`` file: chunks in blocks of 32 KiB, each behind its checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, position, record, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too little for another chunk
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4:position + 7])
        record += content[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last chunk
            found.append(Record.FromString(record))
            record = b""
    return found


def test_offline_runs_of_the_real_module(tmp_path):
    """A run in two parts, each a process of its own: the same id, and together the figures of metrics.jsonl."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    write = ("import pathlib, sys; from metrics import MetricsWriter, start_wandb; first = int(sys.argv[2])\n"
             "folder = pathlib.Path(sys.argv[1])\n"
             "wandb_run = start_wandb('strips', 'net/run', {'TRAIN': {'EPOCHS': 2}}, folder)\n"
             "metrics = MetricsWriter(folder, first // 2, first, wandb_run)\n"
             "for step in first + 1, first + 2:\n"
             "    metrics.write('train', step, first // 2, step / 2, loss=1 / step, lr=0.1)\n"
             "metrics.write('eval', first + 2, first // 2, first // 2 + 1, acc1=50.0 + first)\n"
             "metrics.close()")
    for first in (0, 2):
        result = run(["-c", write, tmp_path, first], WANDB_MODE="offline", WANDB_SILENT="true")
        assert result.returncode == 0, result.stderr
    logged, ids = {}, []
    for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for record in offline_records(path):
            if record.HasField("run"):
                ids.append(record.run.run_id)
                assert record.run.project == "strips" and record.run.display_name == "net/run"
                assert json.loads({item.key: item.value_json for item in record.run.config.update}["TRAIN"]) == {
                    "EPOCHS": 2}
            if record.HasField("history"):
                figures = {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                           for item in record.history.item}
                logged[record.history.step.num] = {k: v for k, v in figures.items() if not k.startswith("_")}
    assert ids == [(tmp_path / "wandb_id.txt").read_text().strip()] * 2
    expected = {}
    for step, figures in by_kind(tmp_path):
        expected.setdefault(step, {}).update(figures)
    assert logged == expected and list(logged) == [1, 2, 3, 4]
