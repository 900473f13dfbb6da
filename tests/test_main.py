"""The command line, end to end, on tiny trainings."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

import checkpoint
import main
from config import load_config, to_dict
from models import build_model, to_released_state_dict
from tests.helpers import (
    DIGITS,
    FAULTS,
    IMAGES,
    TINY,
    another_run,
    arguments,
    differences,
    digits_folder,
    few_digits,
    folder,
)
from tests.nets import as_stored
from tests.processes import run, run_interpreter, torchrun


def records(output, tag="run"):
    return [json.loads(line) for line in (folder(output, tag) / "metrics.jsonl").read_text().splitlines()]


# ---- one run ---------------------------------------------------------------------------------------

def test_what_a_run_leaves_behind(trained):
    run_folder = folder(trained)
    assert {path.name for path in run_folder.iterdir()} >= {
        "best.pth", "ckpt_step_00000007.pth", "ckpt_step_00000014.pth", "config.yaml", "run.yaml", "log_rank0.txt",
        "metrics.jsonl", "tensorboard", "curves.png"}
    newest = checkpoint.load_file(run_folder / "ckpt_step_00000014.pth")
    assert {"model", "optimizer", "lr_scheduler", "epoch", "max_accuracy", "config", "model_ema"} <= newest.keys()
    assert newest["epoch"] == 2 and newest["step"] == 14 and newest["classes"] == list("0123456789")
    assert torch.load(run_folder / "best.pth", weights_only=True)["epoch"] in (1, 2)
    described = yaml.safe_load((run_folder / "run.yaml").read_text())
    assert described["torch"] == torch.__version__ and described["python"] == sys.version.split()[0]
    assert described["timm"] and described["git_commit"] and described["world_size"] == 1
    assert described["effective_batch"] == 40 and described["base_lr"] == 2e-3
    again = load_config(run_folder / "config.yaml")
    assert to_dict(again) == newest["config"]


def test_log_and_metrics(trained):
    log = (folder(trained) / "log_rank0.txt").read_text()
    assert "\x1b[" not in log, "colours in a file"
    assert "Train: [0/2][3/7]  eta 0:0" in log and "grad_norm" in log and "G multiply-accumulates" in log
    train_records = [record for record in records(trained) if record["kind"] == "train"]
    assert [record["step"] for record in train_records] == [3, 6, 7, 9, 12, 14]
    assert all(record["loss"] > 0 and record["lr"] > 0 and record["grad_norm"] > 0 for record in train_records)
    evals = [record for record in records(trained) if record["kind"] == "eval_ema"]
    assert [record["images"] for record in evals] == [40, 40]
    best = checkpoint.load_file(folder(trained) / "best.pth")["max_accuracy"]
    assert best == max(record["acc1"] for record in records(trained) if record["kind"].startswith("eval"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder(trained) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 7, 9, 12, 14]
    assert events.Scalars("eval_ema/acc1")[-1].value == pytest.approx(evals[-1]["acc1"])


def test_a_run_ends_with_its_curves_and_where_everything_is(trained):
    """The picture's lines are tested in test_plots.py; here that it is drawn, from this run's records."""
    with Image.open(folder(trained) / "curves.png") as image:
        assert image.size == (1575, 510) and len(image.convert("RGB").getcolors(2**20)) > 100
    assert not (folder(trained) / "elsewhere.png").exists()  # to where a link in its place led before
    summary = (folder(trained) / "log_rank0.txt").read_text().partition("Best top-1")[2].splitlines()[1:]
    named = {line[:20].strip(): line[20:].strip() for line in summary}
    assert named == {what: str(folder(trained) / name) for what, name in {
        "best checkpoint": "best.pth", "newest checkpoint": "ckpt_step_00000014.pth", "log": "log_rank0.txt",
        "metrics": "metrics.jsonl", "curves": "curves.png", "TensorBoard events": "tensorboard"}.items()}


def test_the_same_command_again_trains_nothing(trained):
    before = checkpoint.load_file(folder(trained) / "ckpt_step_00000014.pth")
    assert main.main(arguments(trained)) == 0
    assert differences(before, checkpoint.newest_checkpoint(folder(trained))[1]) == []
    assert len(records(trained)) == 10


def test_the_same_seed_gives_the_same_bits(trained, tmp_path):
    assert main.main(arguments(tmp_path, "DATA.NUM_WORKERS", 2)) == 0
    a, b = (checkpoint.load_file(folder(path) / "ckpt_step_00000014.pth")["model"] for path in (trained, tmp_path))
    assert differences(a, b) == []
    assert main.main(arguments(tmp_path, "SEED", 1, "TRAIN.EPOCHS", 1, tag="seed1")) == 0
    other = checkpoint.load_file(folder(tmp_path, "seed1") / "ckpt_step_00000007.pth")["model"]
    assert differences(a, other)


@pytest.fixture
def own_determinism(monkeypatch):
    """Puts PyTorch's settings back after a test that makes the process deterministic."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(trained, tmp_path, monkeypatch, own_determinism, capsys):
    """All of Strip-MLP's operations have a deterministic form on the CPU, the one that they have anyhow."""
    assert main.main(arguments(tmp_path, "DETERMINISTIC", True)) == 0
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    a, b = (checkpoint.load_file(folder(path) / "ckpt_step_00000014.pth")["model"] for path in (trained, tmp_path))
    assert differences(a, b) == []
    # An operation without such a form says what to do.
    monkeypatch.setattr(main.inference, "build_network",
                        lambda config: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)))
    assert main.main(arguments(tmp_path, "DETERMINISTIC", True, tag="other")) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "put_" in last and "Set DETERMINISTIC False, or use a network without this operation." in last


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [["--amp-dtype", "bf16"], ["--amp-dtype", "fp32"]], ids=" ".join)
def test_deterministic_algorithms_on_cuda(tmp_path, flags):
    models = []
    for tag in ("one", "two"):
        options = arguments(tmp_path, "DETERMINISTIC", True, tag=tag, flags=flags)
        options[options.index("--device") + 1] = "cuda"
        result = run_interpreter(["main.py", *options])
        assert result.returncode == 0, result.stdout
        models.append(checkpoint.load_file(folder(tmp_path, tag) / "ckpt_step_00000014.pth")["model"])
    assert differences(*models) == []


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 4, "KEEP_CHECKPOINTS", 2)) == 0
    names = sorted(path.name for path in folder(tmp_path).glob("*.pth"))
    assert names == ["best.pth", "ckpt_step_00000021.pth", "ckpt_step_00000028.pth"]


def test_save_freq(tmp_path):
    assert main.main(arguments(tmp_path, "TRAIN.EPOCHS", 3, "SAVE_FREQ", 2, "TRAIN.BASE_LR", 1e-12,
                               "TRAIN.WARMUP_LR", 0.0, "TRAIN.MIN_LR", 0.0, "TRAIN.EMA.ENABLED", False,
                               "KEEP_CHECKPOINTS", 9)) == 0
    steps = [path.name for path in checkpoint.list_checkpoints(folder(tmp_path))]
    assert steps[0] == "ckpt_step_00000021.pth" and "ckpt_step_00000014.pth" in steps  # the last, and every second


def test_save_minutes(tmp_path):
    """Every update is later than a ten-thousandth of a second after the last checkpoint."""
    options = ("TRAIN.EPOCHS", 1, "SAVE_MINUTES", 1e-6, "KEEP_CHECKPOINTS", 99)
    assert main.main(arguments(tmp_path, *options)) == 0
    assert [checkpoint.load_file(path)["step"] for path in checkpoint.list_checkpoints(folder(tmp_path))] == [
        7, 6, 5, 4, 3, 2, 1]


def test_a_timm_model_trains_by_the_same_recipe(tmp_path):
    options = ("MODEL.TYPE", "timm", "MODEL.ARCH", "test_resnet", "DATA.IMG_SIZE", 32)
    assert main.main(arguments(tmp_path, *options)) == 0
    losses = [record["loss"] for record in records(tmp_path) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


# ---- evaluation ------------------------------------------------------------------------------------

def test_eval_repeats_the_training_s_last_evaluation(trained, tmp_path):
    last = folder(trained) / "ckpt_step_00000014.pth"
    assert main.main(arguments(tmp_path, flags=["--eval", "--resume", str(last)])) == 0
    report = json.loads((folder(tmp_path) / "eval.json").read_text())
    for kind in ("eval", "eval_ema"):
        logged = [record for record in records(trained) if record["kind"] == kind][-1]
        for key in ("acc1", "acc5", "images"):
            assert report[kind][key] == logged[key]
        assert report[kind]["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    digest = subprocess.run(["sha256sum", last], capture_output=True, text=True).stdout.split()[0]
    assert report["sha256"] == digest and report["environment"]["torch"] == torch.__version__
    assert report["config"]["DATA"]["DATASET"] == "imagefolder"


def test_eval_takes_the_run_s_best_checkpoint_by_itself(trained):
    assert main.main(arguments(trained, flags=["--eval"])) == 0
    report = json.loads((folder(trained) / "eval.json").read_text())
    best = checkpoint.load_file(folder(trained) / "best.pth")["max_accuracy"]
    assert max(report[kind]["acc1"] for kind in ("eval", "eval_ema")) == best


@pytest.mark.parametrize("layout", ["proj_w", "proh_w"])
def test_eval_of_a_released_checkpoint(trained, tmp_path, layout):
    from yacs.config import CfgNode
    ours = checkpoint.load_file(folder(trained) / "ckpt_step_00000014.pth")
    path = tmp_path / "released.pth"
    torch.save({"model": as_stored(ours["model"], layout), "epoch": 1, "max_accuracy": 1.0,
                "config": CfgNode({"MODEL": {"NAME": "smlp"}})}, path)
    assert main.main(arguments(tmp_path, flags=["--eval", "--resume", str(path)])) == 0
    logged = [record for record in records(trained) if record["kind"] == "eval"][-1]
    report = json.loads((folder(tmp_path) / "eval.json").read_text())
    assert report["eval"]["acc1"] == logged["acc1"] and "eval_ema" not in report


def test_eval_of_a_network_that_overflows_is_refused(trained, tmp_path, capsys):
    """Its weights are finite; its accuracy would be that of a guess."""
    content = torch.load(folder(trained) / "best.pth", weights_only=True)
    for weights in (content["model"], content["model_ema"]):
        for value in weights.values():
            if value.is_floating_point():
                value.mul_(1e38).clamp_(-1e38, 1e38)
    torch.save(content, tmp_path / "huge.pth")
    assert main.main(arguments(tmp_path, flags=["--eval", "--resume", str(tmp_path / "huge.pth")])) == 2
    assert "huge.pth: the network's outputs overflow in fp32" in capsys.readouterr().out
    assert not (folder(tmp_path) / "eval.json").exists()


def test_eval_at_another_size_adapts_and_resuming_does_not(trained, tmp_path, capsys):
    best = str(folder(trained) / "best.pth")
    options = ("DATA.IMG_SIZE", 32)
    assert main.main(arguments(tmp_path, *options, flags=["--eval", "--resume", best])) == 0
    assert "WARNING: the weights are for another input size" in capsys.readouterr().out
    assert json.loads((folder(tmp_path) / "eval.json").read_text())["eval_ema"]["images"] == 40
    assert main.main(arguments(tmp_path, *options, tag="resumed", flags=["--resume", best])) == 2
    assert "another network or data set: DATA.IMG_SIZE 16 -> 32" in capsys.readouterr().out


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """``evaluated(processes, batch_size)``: the results on 61 images, which hardly a number divides."""
    output = tmp_path_factory.mktemp("evaluated")
    data = digits_folder(output / "data", val=61)

    @functools.cache
    def evaluated(processes, batch_size):
        tag, flags = f"{processes}_{batch_size}", ["--eval", "--resume", str(folder(trained) / "best.pth")]
        command = arguments(output, "DATA.DATA_PATH", data, "DATA.BATCH_SIZE", batch_size, tag=tag, flags=flags)
        if processes == 1:
            assert main.main(command) == 0
        else:
            result = run([*torchrun(processes), "main.py", *command])
            assert result.returncode == 0, result.stderr
        results = json.loads((folder(output, tag) / "eval.json").read_text())
        return {kind: results[kind] for kind in ("eval", "eval_ema")}

    return evaluated


@pytest.mark.parametrize("processes, batch_size", [
    (1, 7), pytest.param(2, 5, marks=pytest.mark.slow), (2, 16), (3, 4)])
def test_eval_is_the_same_for_any_number_of_processes_and_batch_size(evaluated, processes, batch_size):
    assert evaluated(processes, batch_size) == evaluated(1, 61)
    assert evaluated(1, 61)["eval"]["images"] == 61


def test_throughput(capsys):
    assert main.main([*arguments("unused", flags=["--throughput", "--batch-size", "4"])]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "images/s, batch size 4, fp32, CPU" in line
    assert float(line.split(": ")[1].split(" images/s")[0]) > 0


# ---- weights to start from -------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["own", "proh_w"])
def test_pretrained_with_another_number_of_classes(tmp_path, layout):
    """A network of 7 classes starts a training of 10: all but the head is loaded."""
    config = load_config(DIGITS, [*TINY, "MODEL.NUM_CLASSES", 7])
    torch.manual_seed(5)
    source = build_model(config).state_dict()
    torch.save({"model": as_stored(source, layout)}, tmp_path / "seven.pth")
    options = ("TRAIN.EPOCHS", 1, "TRAIN.BASE_LR", 1e-12, "TRAIN.WARMUP_LR", 0.0, "TRAIN.MIN_LR", 0.0)
    assert main.main(arguments(tmp_path, *options, flags=["--pretrained", str(tmp_path / "seven.pth")])) == 0
    log = (folder(tmp_path) / "log_rank0.txt").read_text()
    assert "re-initialised: head.weight, head.bias" in log
    after = checkpoint.load_file(folder(tmp_path) / "ckpt_step_00000007.pth")["model"]
    for key, value in source.items():
        if not key.startswith("head.") and "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(after[key], value, rtol=0, atol=1e-9)


def test_resume_from_a_named_checkpoint(trained, tmp_path):
    path = folder(trained) / "ckpt_step_00000007.pth"
    assert main.main(arguments(tmp_path, flags=["--resume", str(path)])) == 0
    a, b = (checkpoint.load_file(folder(output) / "ckpt_step_00000014.pth") for output in (trained, tmp_path))
    for content in (a, b):
        content.pop("config")
    assert differences(a, b) == []


def test_resume_from_a_checkpoint_with_released_keys(trained, tmp_path):
    """The whole state of a training, its weights under the keys of MLP-DINO: it ends at the same bits."""
    content = checkpoint.load_file(folder(trained) / "ckpt_step_00000007.pth")
    content |= {name: as_stored(content[name], "proh_w") for name in ("model", "model_ema")}
    checkpoint.save_file(content, tmp_path / "proh_w.pth")
    assert main.main(arguments(tmp_path, flags=["--resume", str(tmp_path / "proh_w.pth")])) == 0
    a, b = (checkpoint.load_file(folder(output) / "ckpt_step_00000014.pth") for output in (trained, tmp_path))
    assert all(differences(a[name], b[name]) == [] for name in ("model", "model_ema", "optimizer"))


def test_resume_from_a_checkpoint_without_class_names(trained, tmp_path):
    """As runs wrote them before class names were saved."""
    path = folder(trained) / "ckpt_step_00000007.pth"
    old = checkpoint.load_file(path)
    del old["classes"]
    checkpoint.save_file(old, tmp_path / "old.pth")
    assert main.main(arguments(tmp_path, tag="again", flags=["--resume", str(tmp_path / "old.pth")])) == 0
    a, b = (checkpoint.load_file(p / "ckpt_step_00000014.pth") for p in (folder(trained), folder(tmp_path, "again")))
    assert differences(a["model"], b["model"]) == [] and b["classes"] == a["classes"]


def test_released_checkpoint_cannot_be_resumed(trained, tmp_path, capsys):
    ours = checkpoint.load_file(folder(trained) / "best.pth")
    torch.save({"model": to_released_state_dict(ours["model"]), "epoch": 1}, tmp_path / "released.pth")
    assert main.main(arguments(tmp_path, flags=["--resume", str(tmp_path / "released.pth")])) == 2
    out = capsys.readouterr().out
    assert "it lacks" in out and "--pretrained" in out


# ---- launchers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("launcher, processes", [
    pytest.param([], 1, id="none", marks=pytest.mark.slow),
    pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2], 2, id="torchrun"),
    pytest.param(["-W", "ignore", "-m", "torch.distributed.launch", "--nproc_per_node", 2, "--master_port", 29517], 2,
                 id="torch.distributed.launch", marks=pytest.mark.slow),
])
def test_launchers(tmp_path, launcher, processes):
    """Each in interpreters of its own, as a shell starts it, on the bundled data."""
    options = arguments(tmp_path, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 100, "DATA.DATASET", "digits")
    result = run_interpreter([*launcher, "main.py", *options])
    assert result.returncode == 0, result.stderr
    described = yaml.safe_load((folder(tmp_path) / "run.yaml").read_text())
    assert described["world_size"] == processes and described["effective_batch"] == 100 * processes
    assert result.stdout.count("Best top-1") == 1, "every rank printed"
    newest = checkpoint.newest_checkpoint(folder(tmp_path))[1]
    assert newest["step"] == 1437 // (100 * processes) and len(newest["rng"]) == processes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nccl(tmp_path):
    """All GPUs through the launcher: NCCL, DistributedDataParallel and SyncBatchNorm, also on a single one."""
    processes = torch.cuda.device_count()
    batch_size = IMAGES["train"] // processes // 4 * 2  # even, for mixup, and two updates an epoch
    assert batch_size >= 2, f"{IMAGES['train']} images are too few for {processes} GPUs"
    options = arguments(tmp_path, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", batch_size, "TRAIN.SYNC_BN", True)
    options[options.index("--device") + 1] = "cuda"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    result = run_interpreter([*launcher, "main.py", *options])
    assert result.returncode == 0, result.stderr
    assert "Best top-1" in result.stdout


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [["--amp-dtype", "bf16"], ["--amp-dtype", "fp16"], ["--amp-dtype", "fp32"],
                                   ["--use-checkpoint"], ["--compile"]], ids=" ".join)
def test_cuda_trains_and_resumes(tmp_path, flags):
    for epochs in (1, 2):
        options = arguments(tmp_path, "TRAIN.EPOCHS", epochs, "TRAIN.WARMUP_EPOCHS", 0, flags=flags)
        options[options.index("--device") + 1] = "cuda"
        assert main.main(options) == 0
    assert "7 updates done" in (folder(tmp_path) / "log_rank0.txt").read_text()
    losses = [record["loss"] for record in records(tmp_path) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


# ---- what a user can get wrong ---------------------------------------------------------------------

def test_amp_opt_level_is_deprecated(tmp_path, capsys):
    assert main.main(arguments(tmp_path, flags=["--amp-opt-level", "O1", "--throughput", "--batch-size", "2"])) == 0
    assert "WARNING: --amp-opt-level" in capsys.readouterr().out


def test_a_second_run_on_one_folder_is_refused(tmp_path, capsys):
    folder(tmp_path).mkdir(parents=True)
    with another_run(folder(tmp_path)):
        assert main.main(arguments(tmp_path)) == 2
    assert "in use by another run" in capsys.readouterr().out
    assert not list(folder(tmp_path).glob("*.pth"))


def test_disk_full_while_saving_does_not_stop_the_run(tmp_path):
    result = run([FAULTS, "disk_full_while_saving", 1, "--", *arguments(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert "COULD NOT SAVE A CHECKPOINT" in result.stdout and "No space left" in result.stdout
    assert sorted(path.name for path in folder(tmp_path).glob("*.pth")) == ["best.pth", "ckpt_step_00000014.pth"]
    assert not list(folder(tmp_path).glob(".*.tmp"))


def test_closed_stdout_does_not_stop_the_run(tmp_path):
    """Nobody reads the pipe any more, as after ``| head``."""
    program = ("import os, runpy; reader, writer = os.pipe(); os.dup2(writer, 1); os.close(writer); os.close(reader); "
               "runpy.run_path('main.py', run_name='__main__')")
    result = run(["-c", program, *arguments(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert "Best top-1" in (folder(tmp_path) / "log_rank0.txt").read_text()


# ---- evaluation ------------------------------------------------------------------------------------

def test_an_epoch_outlives_a_validation_image_that_cannot_be_read(tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(few_digits(), data)
    image = sorted((data / "val" / "7").iterdir())[0]
    good = image.read_bytes()
    image.write_bytes(good[:50])
    command = arguments(tmp_path, "TRAIN.EPOCHS", 1, "DATA.DATA_PATH", data)
    assert main.main(command) == 2
    out = capsys.readouterr().out
    assert f"7/{image.name}" in out.splitlines()[-1] and "SKIP_BAD_IMAGES" in out
    saved, = checkpoint.list_checkpoints(folder(tmp_path))
    image.write_bytes(good)
    assert main.main(command) == 0
    resumed = capsys.readouterr().out
    assert "Train:" not in resumed and "eval: epoch 0" in resumed
    before, after = (checkpoint.load_file(path)["model"] for path in (saved, folder(tmp_path) / "best.pth"))
    assert differences(before, after) == []


def test_a_temporary_folder_too_long_for_sockets_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main.tempfile, "gettempdir", lambda: "/tmp/" + "x" * 80)
    assert main.main(arguments(tmp_path)) == 2
    assert "set TMPDIR to a shorter one" in capsys.readouterr().out


def test_a_network_that_broke_is_not_saved_over_the_run(tmp_path, capsys):
    """Fewer updates than TRAIN.MAX_SKIPPED, and a loss that is no number."""
    options = ("TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 9e18, "TRAIN.EMA.ENABLED", False)
    assert main.main(arguments(tmp_path, *options)) == 1
    assert "outputs are not finite after epoch 0, which is not saved" in capsys.readouterr().out
    assert not checkpoint.list_checkpoints(folder(tmp_path))
