"""What goes wrong around a run: workers, signals, disks, images, processes without work."""

import csv
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
import yaml
from PIL import Image

import checkpoint
import main
from tests.helpers import FAULTS, arguments, folder
from tests.processes import FORKING, Fork, run, torchrun, wait_for

ON_TWO = ("DATA.BATCH_SIZE", 10, "DATA.NUM_WORKERS", 1)  # 14 updates an epoch


def image_folder(root, train, val, seed=0):
    """An ImageFolder of two classes with that many images of noise in each split."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(label, count, 2):
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return ["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", root, "MODEL.NUM_CLASSES", 2, "DATA.BATCH_SIZE", 4,
            "TRAIN.EPOCHS", 1]


@pytest.fixture
def start():
    """``start(output, *options, fault=...)``: a training that waits somewhere, once it does; ended after the test."""
    started = []

    def start(output, *options, launcher=(), fault):
        process = Fork([*launcher, FAULTS, *fault, "--", *arguments(output, *options)], merge=True)
        started.append(process)
        wait_for(lambda: "hangs" in process.stdout, process)
        return process

    yield start
    for process in started:
        process.kill()


def wait_until_gone(process, seconds):
    """Fails where processes of a command, data workers included, live on for longer than that."""
    deadline = time.monotonic() + seconds
    while process.living() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.living() == []


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_signal_to_a_whole_process_group(start, tmp_path, number):
    """Ctrl-C in a terminal, or a scheduler: the data workers get the signal too and must finish the update."""
    options = ("DATA.NUM_WORKERS", 2, "DATA.BATCH_SIZE", 10, "TRAIN.ACCUMULATION_STEPS", 28)
    process = start(tmp_path, *options, fault=["hang_at_batch", 2, 1])
    process.signal_all(number)
    assert process.wait() == 75, process.stdout
    assert f"{number.name}: stopping after this update" in process.stdout
    assert f"stopped by {number.name}" in process.stdout and "Traceback" not in process.stdout
    assert main.main(arguments(tmp_path, *options)) == 0
    assert "1 updates done" in (folder(tmp_path) / "log_rank0.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signal_while_data_workers_start(start, tmp_path, number):
    process = start(tmp_path, "DATA.NUM_WORKERS", 2, fault=["slow_start_of_workers", 2])
    process.signal_all(number)
    assert process.wait() == 75 and "Traceback" not in process.stdout, process.stdout
    assert checkpoint.newest_checkpoint(folder(tmp_path))[0].name == "ckpt_step_00000001.pth"


def test_ctrl_c_under_the_launcher(start, tmp_path):
    """The launcher alone gets it, since its processes are in sessions of their own, and passes it on to them."""
    process = start(tmp_path, *ON_TWO, launcher=torchrun(2), fault=["hang_at_step", 3, 3])
    process.signal(signal.SIGINT)
    assert process.wait() != 0
    assert "stopped by SIGINT" in process.stdout and "[rank" not in process.stdout
    newest = checkpoint.newest_checkpoint(folder(tmp_path))[0].name
    assert newest == "ckpt_step_00000005.pth"  # two processes agree while the update after the signal runs
    wait_until_gone(process, seconds=15)


@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow)])
def test_second_signal_ends_a_run_that_hangs(start, tmp_path, number, status):
    process = start(tmp_path, "DATA.NUM_WORKERS", 1, fault=["hang_at_step", 3, 1000])
    process.signal_all(number)
    time.sleep(2)  # for a second it would pass for the same signal again
    assert process.poll() is None
    process.signal_all(number)
    assert process.wait(20) == status and "Traceback" not in process.stdout
    assert ("ERROR: interrupted" in process.stdout) == (status == 130)
    wait_until_gone(process, seconds=15)


def test_signal_that_is_passed_on_is_no_second_one(start, tmp_path):
    process = start(tmp_path, fault=["hang_at_step", 3, 3])
    for _ in range(2):
        process.signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait() == 75, process.stdout
    assert checkpoint.newest_checkpoint(folder(tmp_path))[0].name == "ckpt_step_00000004.pth"


def test_ctrl_c_while_evaluating(tmp_path):
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 1)) == 0
    result = run([FAULTS, "interrupt_evaluation", "SIGINT", "--", *arguments(tmp_path, flags=["--eval"])])
    assert result.returncode == 130
    assert result.stdout.splitlines()[-1].endswith("ERROR: interrupted") and result.stderr == ""


@pytest.mark.parametrize("fault", [("kill_data_worker_at_step", 5), ("kill_data_worker_while_saving", 3)])
def test_dead_data_worker_ends_the_run(tmp_path, fault):
    options = ("DATA.NUM_WORKERS", 2, "SAVE_STEPS", 2)
    result = run([FAULTS, *fault, "--", *arguments(tmp_path, *options)])
    assert result.returncode == 1
    errors = [line for line in result.stdout.splitlines() if "ERROR" in line]
    assert len(errors) == 1 and "DataLoader worker" in errors[0] and "lower DATA.NUM_WORKERS" in errors[0]
    assert "Traceback" not in result.stdout + result.stderr
    assert checkpoint.newest_checkpoint(folder(tmp_path))[0].name == "ckpt_step_00000004.pth"
    assert not list(folder(tmp_path).glob(".*.tmp"))


@pytest.mark.parametrize("fault", ["raise_at_step", "kill_at_step"])
def test_all_processes_end_when_one_fails(tmp_path, fault):
    for output in (tmp_path / "first", tmp_path / "second"):
        process = run([*torchrun(2), FAULTS, fault, 4, 1, "--", *arguments(output, *ON_TWO, "TRAIN.EPOCHS", 500)])
        assert process.returncode != 0
        wait_until_gone(process, seconds=15)
        log = (folder(output) / "log_rank0.txt").read_text()
        last = [line for line in log.splitlines() if "Train:" in line][-1]  # of the third update
        assert time.time() - time.mktime(time.strptime(last[1:20], "%Y-%m-%d %H:%M:%S")) < 30
        if "Another process of this run has ended" in log:
            return  # torchrun can end a process before it has said why, but hardly twice
    pytest.fail(log + process.stdout + process.stderr)


def test_full_disk_for_the_log(tmp_path):
    result = run([FAULTS, "full_disk_for_the_log", 8, "--", *arguments(tmp_path, "PRINT_FREQ", 1)])
    assert result.returncode == 0, result.stderr
    assert "Best top-1" in result.stdout and "Traceback" not in result.stdout + result.stderr
    assert result.stdout.count("log_rank0.txt: [Errno 28] No space left on device; the run continues") == 1
    assert result.stdout.count("cannot write metrics.jsonl: [Errno 28] No space left on device; the run continues") == 1
    assert checkpoint.newest_checkpoint(folder(tmp_path))[0].name == "ckpt_step_00000014.pth"


def test_no_standard_output_at_all(tmp_path):
    closed = "import os, runpy, sys; os.close(1); sys.stdout = None; runpy.run_path('main.py', run_name='__main__')"
    result = run(["-c", closed, *arguments(tmp_path, "TRAIN.EPOCHS", 1)])
    assert result.returncode == 0, result.stderr
    assert "Best top-1" in (folder(tmp_path) / "log_rank0.txt").read_text()


# ---- images ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_image(tmp_path, capsys, workers):
    options = [*image_folder(tmp_path / "data", 16, 4), "DATA.NUM_WORKERS", workers]
    bad = tmp_path / "data" / "train" / "b" / "5.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    assert main.main(arguments(tmp_path, *options)) == 2
    error = [line for line in capsys.readouterr().out.splitlines() if "ERROR" in line]
    assert len(error) == 1 and f"ERROR: {bad} cannot be decoded" in error[0]
    assert main.main(arguments(tmp_path, *options, "DATA.SKIP_BAD_IMAGES", True)) == 0
    out = capsys.readouterr().out
    assert out.count(f"{bad} cannot be decoded") == 1 and "replaced by the next image (1 so far" in out


def test_many_bad_training_images_do_not_block(tmp_path):
    """Thousands of messages are more than a pipe holds."""
    options = image_folder(tmp_path / "data", 600, 4)
    for path in (tmp_path / "data" / "train").rglob("*.png"):
        if int(path.stem) >= 8:
            path.write_bytes(b"")
    options += ["DATA.BATCH_SIZE", 300, "DATA.NUM_WORKERS", 1, "DATA.SKIP_BAD_IMAGES", True, "PRINT_FREQ", 100]
    result = run(["main.py", *arguments(tmp_path, *options)])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert result.stdout.count("replaced by the next image") > 1000


def test_bad_image_of_one_of_two_processes(tmp_path):
    """The process that meets it names it; the other one ends too, without a traceback."""
    options = [*image_folder(tmp_path / "data", 16, 4), "DATA.NUM_WORKERS", 1]
    bad = tmp_path / "data" / "train" / "b" / "5.png"
    bad.write_bytes(b"")
    result = run([*torchrun(2), "main.py", *arguments(tmp_path, *options)])
    assert result.returncode != 0 and "[rank" not in result.stderr  # as an uncaught exception would be marked
    errors = [line for line in result.stdout.splitlines() if "ERROR" in line]
    assert sum(f"ERROR: {bad} is empty" in line for line in errors) == 1
    others = [line for line in errors if str(bad) not in line]
    assert [line for line in others if "Another process of this run has ended" not in line] == []


def test_bad_validation_image(tmp_path, capsys):
    options = [*image_folder(tmp_path / "data", 16, 4), "TEST.PREDICTIONS", True]
    bad = tmp_path / "data" / "val" / "a" / "2.png"
    bad.write_bytes(b"")
    assert main.main(arguments(tmp_path, *options)) == 2
    out = capsys.readouterr().out
    assert f"ERROR: {bad} is empty" in out and "DATA.SKIP_BAD_IMAGES True" in out
    options += ["DATA.SKIP_BAD_IMAGES", True]
    assert main.main(arguments(tmp_path, *options, flags=["--allow-changes"])) == 0
    out = capsys.readouterr().out
    assert f"{bad} is empty (0 bytes); skipped" in out and "(3 images)" in out
    assert main.main(["--eval", *arguments(tmp_path, *options)]) == 0
    rows = (folder(tmp_path) / "predictions.csv").read_text().splitlines()
    assert len(rows) == 4 and not any("2.png" in row for row in rows)


# ---- evaluation ------------------------------------------------------------------------------------

def test_evaluation_with_a_process_that_gets_no_image(tmp_path):
    """Two images over three processes; every image is counted and predicted once, whatever their number."""
    options = [*image_folder(tmp_path / "data", 16, 2), "TEST.PREDICTIONS", True]
    assert main.main(arguments(tmp_path, *options)) == 0
    reports, predictions = [], []
    for processes in (1, 2, 3):
        flags = ["--eval", "--resume", folder(tmp_path) / "best.pth"]
        launcher = torchrun(processes) if processes > 1 else []
        result = run([*launcher, "main.py", *arguments(tmp_path, *options, tag=f"eval{processes}", flags=flags)])
        assert result.returncode == 0, result.stderr
        reports.append(json.loads((folder(tmp_path, f"eval{processes}") / "eval.json").read_text())["eval_ema"])
        with open(folder(tmp_path, f"eval{processes}") / "predictions.csv", newline="") as file:
            predictions.append(list(csv.DictReader(file)))
    assert reports[0]["images"] == 2 and reports[0] == reports[1] == reports[2]
    assert [(row["index"], row["target"]) for row in predictions[0]] == [("0", "a"), ("1", "b")]
    assert [os.path.basename(row["image"]) for row in predictions[0]] == ["0.png", "1.png"]
    hits = sum(row["target"] == row["prediction"] for row in predictions[0])
    assert reports[0]["acc1"] == 50 * hits
    assert predictions[0] == predictions[1] == predictions[2]


# ---- several machines ------------------------------------------------------------------------------

def test_two_nodes_through_the_launcher_s_rendezvous(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--rdzv_id", "x", "--rdzv_backend",
            "c10d", "--rdzv_endpoint", f"localhost:{port}", *FORKING, "main.py",
            *arguments(tmp_path, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 20)]
    nodes = [Fork(node) for _ in range(2)]
    assert [node.wait() for node in nodes] == [0, 0], [node.stderr for node in nodes]
    assert yaml.safe_load((folder(tmp_path) / "run.yaml").read_text())["world_size"] == 2
    assert sum(node.stdout.count("Best top-1") for node in nodes) == 1


def test_stopped_data_workers_end_the_run(tmp_path):
    """As on a network drive that stalls: nothing ends, and nothing comes."""
    options = ("DATA.NUM_WORKERS", 1, "HANG_MINUTES", 0.05)
    result = run([FAULTS, "stop_data_worker_at_step", 2, "--", *arguments(tmp_path, *options)], timeout=60)
    assert result.returncode == 1, result.stderr
    assert "the data workers gave no batch within HANG_MINUTES" in result.stdout.splitlines()[-1], result.stderr
