"""The SLURM script, with stand-ins for SLURM's own commands and for the launcher."""

import os
import signal
import subprocess
import time

import pytest

import checkpoint
from tests.helpers import arguments, folder
from tests.processes import FORKING, ROOT, Fork, environment, run, torchrun, wait_for

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SLURM_LOG"; fi',
    "srun": 'echo "$1 $2" > "$SLURM_LOG.srun"; shift 2; echo $$ > "$SLURM_LOG.pid"; exec "$@"',
    "scancel": 'echo "$@" >> "$SLURM_LOG"; kill -TERM "$(cat "$SLURM_LOG.pid")"',
    "torchrun": 'printf "%s\\n" "$@" > "$SLURM_LOG.torchrun"; trap "exit 1" TERM; while :; do sleep 0.1; done',
}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job among stand-ins for SLURM's commands, which write to ``$SLURM_LOG``."""
    for name, text in STAND_INS.items():
        add_command(tmp_path / name, text)
    return environment(**{
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_LOG": tmp_path / "slurm.log", "SLURM_JOB_ID": 42,
        "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": 1, "SLURM_GPUS_ON_NODE": 2, "SLURM_CPUS_PER_TASK": 64,
    })


def add_command(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_status_of_a_step_that_dies_at_once(tmp_path, slurm):
    """Before the script looks for it: each of the script's commands takes a tenth of a second here."""
    add_command(tmp_path / "srun", "exit 3")
    (tmp_path / "slow.sh").write_text("trap 'sleep 0.1' DEBUG\n")
    job = subprocess.run(["bash", "tools/slurm_train.sh"], cwd=ROOT, env=slurm | {"BASH_ENV": tmp_path / "slow.sh"},
                         capture_output=True, text=True)
    assert (job.returncode, job.stderr) == (3, "")


def test_preempted_job_saves_itself_and_is_requeued(tmp_path, slurm):
    """The script passes the signal on and puts the job back; the launcher's command that it starts saves itself."""
    log, launched = tmp_path / "slurm.log", tmp_path / "slurm.log.torchrun"
    options = ("DATA.BATCH_SIZE", 10, "TRAIN.EPOCHS", 200, "SAVE_FREQ", 1000)
    job = subprocess.Popen(["bash", "tools/slurm_train.sh", *arguments(tmp_path, *options)], cwd=ROOT, env=slurm,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not (launched.exists() and launched.read_text().endswith("1000\n")):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert log.read_text() == "--signal=TERM 42.0\nrequeue 42\n", output
    assert (tmp_path / "slurm.log.srun").read_text() == "--cpus-per-task 64\n"
    assert job.returncode == 1

    training = Fork(["-m", "torch.distributed.run", *FORKING, *launched.read_text().splitlines()], merge=True)
    metrics = folder(tmp_path) / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), training)
    training.signal(signal.SIGTERM)
    assert training.wait() != 0 and "stopped by SIGTERM" in training.stdout
    step = checkpoint.newest_checkpoint(folder(tmp_path))[1]["step"]
    shorter = arguments(tmp_path, *options, "TRAIN.EPOCHS", 1 + step // 14, flags=["--allow-changes"])
    again = run([*torchrun(2), "main.py", *shorter])
    assert again.returncode == 0 and f"{step} updates done" in again.stdout
