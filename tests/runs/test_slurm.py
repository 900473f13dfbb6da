"""The SLURM script, with stand-ins for SLURM's own commands."""

import os
import signal
import stat
import subprocess
import sys
import time

import checkpoint
from tests.helpers import ROOT, arguments, environment, folder, run, torchrun

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$SLURM_LOG"; fi',
    "srun": 'echo $$ > "$SLURM_LOG.pid"; exec "$@"',
    "scancel": 'echo "$@" >> "$SLURM_LOG"; kill -TERM "$(cat "$SLURM_LOG.pid")"',
}


def test_preempted_job_saves_itself_and_is_requeued(tmp_path):
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "slurm.log"
    variables = {
        "PATH": f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "SLURM_LOG": log,
        "SLURM_JOB_ID": 42, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": 1, "SLURM_GPUS_ON_NODE": 2,
    }
    options = ("DATA.BATCH_SIZE", 50, "TRAIN.EPOCHS", 200, "SAVE_FREQ", 1000)
    job = subprocess.Popen(["bash", "tools/slurm_train.sh", *arguments(tmp_path, *options)], cwd=ROOT,
                           env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = folder(tmp_path) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()[0]
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=60)[0]
    assert log.read_text() == "--signal=TERM 42.0\nrequeue 42\n", output
    assert "stopped by SIGTERM" in output
    newest = checkpoint.newest_checkpoint(folder(tmp_path))[0]
    step = checkpoint.load_file(newest)["step"]
    again = run([*torchrun(2), "main.py", *arguments(tmp_path, *options, "TRAIN.EPOCHS", 1 + step // 14)])
    assert again.returncode == 0 and f"{step} updates done" in again.stdout
