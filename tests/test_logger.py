"""The log, the metrics, the description of a run."""

import io
import json
import logging
import os
import shlex
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import main
from config import load_config
from logger import MetricsWriter, count_macs, describe_environment, open_log, setup_console
from models import StripMLPNet, build_model
from tests.helpers import arguments, folder
from tests.processes import ROOT, environment, run

logger = logging.getLogger("strip_mlp")
pytestmark = pytest.mark.usefixtures("log_handlers")

# ---- the log ---------------------------------------------------------------------------------------


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
from logger import logger, open_log, setup_console, count_macs, describe_environment
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


# ---- metrics ---------------------------------------------------------------------------------------

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
    write = ("import pathlib, sys; from logger import MetricsWriter, start_wandb; first = int(sys.argv[2])\n"
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


# ---- the description of a run ----------------------------------------------------------------------

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("variant, giga", [("tiny_light", 2.52), ("tiny", 3.65), ("small", 6.80), ("base", 9.18)])
def test_macs_of_the_variants(variant, giga):
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / f"smlp_{variant}_alpha3_patch4_224_imagenet1k.yaml"))
    assert count_macs(model, (3, 224, 224)) == pytest.approx(giga * 1e9, rel=0.01)


def test_macs_by_hand():
    """C = 8, 32x32 input, one block a stage, P = 2, 3 classes, term by term."""
    model = StripMLPNet(img_size=32, num_classes=3, embed_dim=8, depths=(1, 1, 1, 1), num_patches=2)
    total = 8 * 3 * 16 * 8 * 8 + 64 * 3  # stem, head
    for c, side in [(8, 8), (16, 4), (32, 2), (64, 1)]:
        tokens, half = side * side, c // 2
        total += tokens * (9 * c + c * c + c * c + 49 * c + 2 * 3 * c * c)  # the two blocks' own layers
        total += 2 * tokens * half * 3 * side + 2 * tokens * 2 * half * half  # CGSMM: strips, fusions
        total += 2 * tokens * 21 * half + half * (half // 2) + half // 2 * 3 * half  # LSMM
    for c, side in [(8, 4), (16, 2), (32, 1)]:
        total += side * side * 4 * c * 2 * c  # merging
    total += 2 * 2 * 32 * 4 + 2 * 64 * 4  # shortcuts
    assert count_macs(model, (3, 32, 32)) == total


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_model_as_it_was(training):
    torch.manual_seed(0)
    model = StripMLPNet(img_size=32, num_classes=3, embed_dim=8, depths=(1, 1, 1, 1), drop_path_rate=0.5)
    model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    count_macs(model, (3, 32, 32))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())


def test_describe_environment():
    found = describe_environment(torch.device("cpu"))
    assert (found["torch"], found["world_size"]) == (torch.__version__, 1)
    assert {"python", "torchvision", "timm", "git_commit", "device"} <= found.keys()
    assert all(isinstance(value, (str, int)) for value in found.values())  # YAML and JSON take them as they are
