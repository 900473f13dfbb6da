"""A run that is killed and resumed by the same command ends bit for bit like one that was never killed."""

import functools
import json
import random
import re
import shutil

import pytest

import checkpoint
import main
from tests.helpers import FAULTS, arguments, differences, digits_folder, folder
from tests.processes import run, run_interpreter, torchrun

UPDATES = 14  # of the runs below: 2 epochs of 14 micro-batches of 20 images, two to an update
OPTIONS = {  # by the number of processes
    1: ("DATA.BATCH_SIZE", 20, "DATA.NUM_WORKERS", 2, "TRAIN.ACCUMULATION_STEPS", 2, "SAVE_STEPS", 2),
    2: ("DATA.BATCH_SIZE", 10, "DATA.NUM_WORKERS", 1, "TRAIN.ACCUMULATION_STEPS", 2, "SAVE_STEPS", 2),
}


def command(processes, output, *fault):
    """The command line of such a run, with a fault if there is one."""
    launcher = torchrun(processes) if processes > 1 else []
    script = [FAULTS, *fault, "--"] if fault else ["main.py"]
    return [*launcher, *script, *arguments(output, *OPTIONS[processes])]


def final_state(output):
    """Everything the run computed: its newest and best checkpoints, and its metrics without the clock's."""
    run_folder = folder(output)
    newest = checkpoint.newest_checkpoint(run_folder)[0]
    state = {"newest": checkpoint.load_file(newest), "best": checkpoint.load_file(run_folder / "best.pth")}
    for content in state.values():
        content["config"].pop("OUTPUT")
        content["config"].pop("HANG_MINUTES")
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("images_per_second", None)
        record.pop("data_share", None)
    return state | {"metrics": records}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The final state of the run that nobody killed, by the number of processes.

    The single process is an interpreter of its own: unlike forks of one, it has another order of hashes.
    """
    @functools.cache
    def reference(processes):
        output = tmp_path_factory.mktemp(f"reference{processes}")
        result = (run_interpreter if processes == 1 else run)(command(processes, output))
        assert result.returncode == 0, result.stderr
        state = final_state(output)
        assert state["newest"]["step"] == UPDATES
        return state

    return reference


def kill(output, processes, *fault):
    """A run that a fault of ``tests/runs/faults.py`` kills."""
    killed = run(command(processes, output, *fault))
    assert killed.returncode != 0 and "killed by the fault" in killed.stdout, killed.stdout + killed.stderr


def resume(output, processes):
    resumed = run(command(processes, output))
    assert resumed.returncode == 0, resumed.stderr
    return resumed


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_at_a_random_step(references, tmp_path, processes):
    step = random.Random(processes).randrange(3, UPDATES)
    kill(tmp_path, processes, "kill_at_step", step)
    saved = step // 2 * 2  # a checkpoint every second update, and after the 7 of the first epoch
    assert f"{max(saved, 7) if step >= 7 else saved} updates done" in resume(tmp_path, processes).stdout
    assert differences(references(processes), final_state(tmp_path)) == []


def test_kill_while_a_checkpoint_is_written(references, tmp_path):
    kill(tmp_path, 1, "kill_while_saving", 3)
    assert list(folder(tmp_path).glob(".*.tmp"))
    resume(tmp_path, 1)
    assert differences(references(1), final_state(tmp_path)) == []
    assert not list(folder(tmp_path).glob(".*.tmp")), "the half-written file was left behind"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_many_kills(references, tmp_path, seed):
    """Two kills a run: at random steps, in either process of two, or while a checkpoint is written."""
    rng = random.Random(1000 + seed)
    processes = 1 + seed % 2
    step = rng.randrange(1, UPDATES - 1)
    kinds = [("kill_while_saving", rng.randrange(1, 5)), ("kill_at_step", step, rng.randrange(processes))]
    kill(tmp_path, processes, *(kinds[0] if seed % 3 == 0 else kinds[1]))
    kill(tmp_path, processes, "kill_at_step", rng.randrange(max(step, 8), UPDATES), rng.randrange(processes))
    resume(tmp_path, processes)
    assert differences(references(processes), final_state(tmp_path)) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_preemption_signal(references, tmp_path, name):
    """The run finishes its update, saves and exits with status 75; the same command goes on."""
    stopped = run(command(1, tmp_path, "signal_at_step", 5, name))
    assert stopped.returncode == 75, stopped.stderr
    assert f"stopped by {name}" in stopped.stdout and "Traceback" not in stopped.stderr
    assert checkpoint.newest_checkpoint(folder(tmp_path))[0].name == "ckpt_step_00000006.pth"
    if name == "SIGTERM":  # what was saved does not depend on the signal
        assert "6 updates done" in resume(tmp_path, 1).stdout
        assert differences(references(1), final_state(tmp_path)) == []


def test_preemption_signal_to_one_of_two_processes(references, tmp_path):
    stopped = run(command(2, tmp_path, "signal_at_step", 4, "SIGTERM", 1))
    assert stopped.returncode != 0
    assert "exitcode  : 75" in stopped.stderr
    newest = checkpoint.newest_checkpoint(folder(tmp_path))[0]
    assert newest.name == "ckpt_step_00000006.pth"  # agreed on during the update after the signal
    assert "6 updates done" in resume(tmp_path, 2).stdout
    ours, reference = final_state(tmp_path), references(2)
    # The extra checkpoint ended a log interval, so the records are cut otherwise; everything else is the same.
    assert differences(ours.pop("metrics")[-1], reference["metrics"][-1]) == []
    assert differences(ours, {key: reference[key] for key in ours}) == []


def test_launcher_restarts_a_killed_worker(references, tmp_path):
    """``torchrun --max-restarts``: the job goes on by itself."""
    fault = [FAULTS, "kill_once_at_step", 7, tmp_path / "marker", "--"]
    result = run([*torchrun(2, "--max-restarts", 1), *fault, *arguments(tmp_path, *OPTIONS[2])])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "marker").exists() and "updates done" in result.stdout
    assert differences(references(2), final_state(tmp_path)) == []


@pytest.mark.slow
def test_launcher_restarts_after_a_process_that_hangs(references, tmp_path):
    """The other process names it after HANG_MINUTES; torchrun takes half a minute to kill it, and restarts the run."""
    fault = [FAULTS, "stop_once_at_step", 7, tmp_path / "marker", "--"]
    result = run([*torchrun(2, "--max-restarts", "1"), *fault, *arguments(tmp_path, *OPTIONS[2], "HANG_MINUTES", 0.1)])
    assert result.returncode == 0, result.stderr
    message = r"no answer within HANG_MINUTES from rank 1 \(process \d+ on .+\); it hangs"
    assert re.search(message, result.stdout), result.stdout
    assert "updates done" in result.stdout
    assert differences(references(2), final_state(tmp_path)) == []


@pytest.mark.slow
def test_a_chain_of_kills_restarts_and_resumes(references, tmp_path):
    """Three runs, each killed at one step, restarted by torchrun and killed there again; then the same command."""
    for step in (3, 7, 12):
        fault = [FAULTS, "kill_at_step", step, step % 2, "--"]
        killed = run([*torchrun(2, "--max-restarts", 1), *fault, *arguments(tmp_path, *OPTIONS[2])])
        assert killed.returncode != 0
        assert killed.stdout.count("updates done") >= 1, killed.stdout  # by the restart
    assert run(command(2, tmp_path)).returncode == 0
    assert differences(references(2), final_state(tmp_path)) == []


def test_resume_with_another_world_size_and_batch_size(tmp_path):
    """The position is recomputed from the images seen: 2 updates of 2 x 20 images are 4 of 2 x 10."""
    assert main.main(arguments(tmp_path, *OPTIONS[1], "TRAIN.EPOCHS", 1, "KEEP_CHECKPOINTS", 99)) == 0
    source = folder(tmp_path) / "ckpt_step_00000002.pth"
    target = folder(tmp_path, "other")
    target.mkdir(parents=True)
    shutil.copy(source, target)
    options = ("DATA.BATCH_SIZE", 10, "TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.EPOCHS", 1)
    assert main.main(arguments(tmp_path, *options, tag="other")) == 0
    log = (target / "log_rank0.txt").read_text()
    assert "resumed with batch_size 20 -> 10: the run continues after the same number of images" in log
    assert "epoch 0, 4 updates done" in log
    newest = checkpoint.newest_checkpoint(target)[1]
    assert newest["step"] == 14 and newest["epoch"] == 1  # 287 images: 28 micro-batches of 10, two to an update


PLAIN = ("TRAIN.EPOCHS", 1, "TRAIN.EMA.ENABLED", False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The output folder of a finished run, to be copied."""
    output = tmp_path_factory.mktemp("plain")
    assert main.main(arguments(output, *PLAIN)) == 0
    return output


@pytest.mark.parametrize("options, reason", [
    (("MODEL.STRIP_MLP.EMBED_DIM", 16), "another network or data set: MODEL.STRIP_MLP.EMBED_DIM 8 -> 16"),
    (("TRAIN.OPTIMIZER.NAME", "sgd"), "its optimizer is another one or has"),
    (("TRAIN.FREEZE_STAGES", 1), "other parameter groups; set TRAIN.OPTIMIZER.NAME, TRAIN.FREEZE_STAGES"),
    (("TRAIN.LAYER_DECAY", 0.9), "has other parameter groups"),
    (("DATA.DATA_PATH", "ANOTHER_FOLDER"),
     "trained on other images: their names or labels differ"),
])
def test_resume_that_makes_no_sense_is_refused(plain, tmp_path, capsys, options, reason):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    options = [digits_folder(tmp_path / "data") if option == "ANOTHER_FOLDER" else option for option in options]
    before = {path.name: path.read_bytes() for path in folder(tmp_path).glob("*.[yp]*")}
    longer = (*PLAIN, "TRAIN.EPOCHS", 2, *options)
    assert main.main(arguments(tmp_path, *longer, flags=["--allow-changes"])) == 2
    assert reason in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder(tmp_path).glob("*.[yp]*")} == before


def test_checkpoints_of_another_step_count_are_set_aside(tmp_path):
    """Larger batches make fewer updates: the run's own later checkpoints must not pass for newer than the next ones."""
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 10)) == 0
    run_folder = folder(tmp_path)
    assert checkpoint.newest_checkpoint(run_folder)[0].name == "ckpt_step_00000028.pth"
    for epochs in (2, 3):
        longer = ("TRAIN.EPOCHS", epochs, "DATA.BATCH_SIZE", 40)
        assert main.main(arguments(tmp_path, *longer, flags=["--allow-changes"])) == 0
        newest = checkpoint.newest_checkpoint(run_folder)[0]
        assert newest.name == f"ckpt_step_{7 * epochs:08d}.pth" and checkpoint.load_file(newest)["epoch"] == epochs
    assert (run_folder / "ckpt_step_00000028.pth.aside").exists()
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record["kind"] == "eval"] == [0, 1, 2]


def test_a_damaged_newer_checkpoint_does_not_crowd_out_good_ones(tmp_path):
    options = ("TRAIN.EPOCHS", 2, "KEEP_CHECKPOINTS", 1)
    assert main.main(arguments(tmp_path, *options)) == 0
    damaged = folder(tmp_path) / "ckpt_step_00000099.pth"
    damaged.write_bytes(b"damaged")
    assert main.main(arguments(tmp_path, *options, "TRAIN.EPOCHS", 3, flags=["--allow-changes"])) == 0
    assert checkpoint.newest_checkpoint(folder(tmp_path))[0].name == "ckpt_step_00000021.pth"
    assert not damaged.exists() and damaged.with_name(damaged.name + ".aside").exists()


@pytest.mark.parametrize("then", ["device", "worker"])
def test_resume_with_augmentation_on_the_device(tmp_path, then):
    """The same bits as without a break; a resume that changes where images are augmented says that its bits differ."""
    options = ("TRAIN.EPOCHS", 1, "SAVE_STEPS", 3, "KEEP_CHECKPOINTS", 9, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1",
               "AUG.SCALE", "[0.3, 1]")
    assert main.main(arguments(tmp_path, *options, "DATA.AUGMENT_ON", "device")) == 0
    target = folder(tmp_path, "other")
    target.mkdir(parents=True)
    shutil.copy(folder(tmp_path) / "ckpt_step_00000003.pth", target)
    options = (*options, "DATA.AUGMENT_ON", then)
    assert main.main(arguments(tmp_path, *options, tag="other", flags=["--allow-changes"])) == 0
    log = (target / "log_rank0.txt").read_text()
    assert "epoch 0, 3 updates done" in log and f"augment_on: {then}" in log
    ours, reference = (checkpoint.load_file(path / "ckpt_step_00000007.pth")["model"] for path in
                       (target, folder(tmp_path)))
    assert (differences(ours, reference) == []) == (then == "device")
    assert ("resumed with augment_on device -> worker" in log) == (then == "worker")


@pytest.mark.parametrize("name", ["lion", "lamb"])  # which counts its updates in its groups
def test_one_of_timm_s_optimisers_resumes_to_the_same_bits(tmp_path, name):
    options = ("TRAIN.OPTIMIZER.NAME", name, "TRAIN.EMA.ENABLED", False, "DATA.BATCH_SIZE", 140)
    assert main.main(arguments(tmp_path, *options)) == 0
    flags = ["--resume", str(folder(tmp_path) / "ckpt_step_00000002.pth")]
    assert main.main(arguments(tmp_path, *options, tag="resumed", flags=flags)) == 0
    whole, resumed = (checkpoint.newest_checkpoint(folder(tmp_path, tag))[1] for tag in ("run", "resumed"))
    assert whole["step"] == 4
    for key in ("model", "optimizer"):
        assert differences(whole[key], resumed[key]) == []
