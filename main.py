"""Trains and evaluates Strip-MLP.

One process, on a GPU if there is one, else on the CPU:

    python main.py --cfg configs/smlp_tiny_alpha3_patch4_224_cifar10.yaml --data-path DIR

Eight GPUs of one machine:

    torchrun --nproc_per_node 8 main.py --cfg configs/smlp_base_alpha3_patch4_224_imagenet1k.yaml --data-path DIR

Evaluation of a checkpoint, this project's or a released one:

    python main.py --eval --cfg configs/X.yaml --resume CKPT --data-path DIR
"""

import argparse
import contextlib
import csv
import hashlib
import json
import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import distributed
import plots
import utils
from checkpointer import PREEMPTED, Checkpointer, Preempted
from config import load_config, nearest, to_dict
from data import build_mixup, build_train_loader, build_val_loader, prepare_data
from engine import Precision, evaluate, measure_throughput, train_one_epoch
from inference import image_shape
from logger import MetricsWriter, add_log_file, setup_console, start_wandb
from lr_scheduler import LRScheduler
from models import (
    adapt_size,
    build_model,
    count_batches_once,
    load_pretrained,
    load_strict,
    model_state_dict,
)
from optimizer import build_optimizer
from state import Layout, TrainState

logger = logging.getLogger("strip_mlp")

# Flags that are short for a config key.
FLAG_KEYS = {
    "batch_size": "DATA.BATCH_SIZE",
    "data_path": "DATA.DATA_PATH",
    "zip": "DATA.ZIP_MODE",
    "cache_mode": "DATA.CACHE_MODE",
    "pretrained": "MODEL.PRETRAINED",
    "resume": "MODEL.RESUME",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "amp_dtype": "AMP_DTYPE",
    "compile": "COMPILE",
    "output": "OUTPUT",
    "tag": "TAG",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; an unknown flag is an error that names the nearest known one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="the run's config, see configs/")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE",
                        help="config keys to set, e.g. --opts TRAIN.EPOCHS 100 AUG.MIXUP 0; config.py lists them all")
    parser.add_argument("--data-path", metavar="DIR", help="the data set's folder")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per process and micro-batch")
    parser.add_argument("--zip", action="store_true", default=None, help="read train.zip and val.zip, not folders")
    parser.add_argument("--cache-mode", metavar="MODE", help="of --zip, in memory: no, part (each its share), full")
    parser.add_argument("--pretrained", metavar="CKPT", help="start from these weights")
    parser.add_argument("--resume", metavar="CKPT", help="go on from this checkpoint, or evaluate it")
    parser.add_argument("--accumulation-steps", type=int, metavar="N", help="micro-batches per update")
    parser.add_argument("--use-checkpoint", action="store_true", default=None, help="gradient checkpointing")
    parser.add_argument("--amp-dtype", metavar="TYPE", help="bf16, fp16, fp32 or auto (bf16 on CUDA, fp32 on the CPU)")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile the network")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="", help="default: cuda where there is a GPU")
    parser.add_argument("--output", metavar="DIR", help="results go to DIR/<model name>/<tag>/; default: output")
    parser.add_argument("--tag", metavar="NAME", help="names the run")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--eval", action="store_true", help="evaluate --resume (default: the run's best checkpoint)")
    mode.add_argument("--throughput", action="store_true", help="measure images per second of the forward pass")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers set LOCAL_RANK
    parser.add_argument("--amp-opt-level", help=argparse.SUPPRESS)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], flags)}")
    return args


def config_overrides(args: argparse.Namespace) -> list:
    """The config keys that the command line sets, as ``load_config`` takes them; flags win over ``--opts``."""
    flags = [(key, getattr(args, flag)) for flag, key in FLAG_KEYS.items() if getattr(args, flag) is not None]
    return [*args.opts, *(item for pair in flags for item in pair)]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0; 2 for what the user can put right; 1 for a training that failed; 75 for one that saved
        itself and stopped on a signal, to go on with the same command; 130 for an interruption by Ctrl-C.
    """
    args = parse_arguments(argv)
    status = 0
    setup_console(is_first=os.environ.get("RANK", "0") == "0")
    try:
        config = load_config(args.cfg, config_overrides(args))
        if args.amp_opt_level:
            logger.warning("--amp-opt-level belongs to apex and is ignored; use --amp-dtype {bf16,fp16,fp32}")
        if config.DETERMINISTIC:
            utils.make_deterministic()
        device = distributed.init_distributed(args.device)
        if args.throughput:
            throughput(config, device)
        else:
            folder = _open_output_folder(config)
            (evaluate_checkpoint if args.eval else train)(config, device, folder)
    except Preempted as signal:
        logger.warning("stopped by %s; the same command goes on from here", signal)
        status = PREEMPTED
    except (ValueError, OSError, FloatingPointError) as error:
        logger.error(_message(error))
        logger.debug("where it happened:", exc_info=True)  # for the log file
        return 1 if isinstance(error, FloatingPointError) else 2  # without waiting for processes that wait for this one
    except RuntimeError as error:
        advice = next((advice for sign, advice in _ADVICE.items() if sign in str(error)), None)
        if advice is None:
            raise
        logger.error(f"{str(error).splitlines()[0].rstrip('. ')}. {advice}")
        logger.debug("where it happened:", exc_info=True)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


# What to do about failures that PyTorch reports as a RuntimeError of some words.
_ADVICE = {
    "DataLoader worker": "Memory is often the reason: lower DATA.NUM_WORKERS, or cache less (--cache-mode).",
    "gloo/transport": "Another process of this run has ended; its own message says why.",
    "deterministic": "Set DETERMINISTIC False, or choose a network without this operation.",
    "out of memory": "Lower --batch-size, with --accumulation-steps to make up for it, or add --use-checkpoint.",
}


def _message(error: Exception) -> str:
    """An error's own words; what a data worker raises arrives with the worker's traceback and the class before them."""
    text = str(error)
    return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text


def train(config, device: torch.device, folder: Path) -> None:
    """Trains, evaluating after every epoch; goes on from the newest checkpoint in ``folder``."""
    lock = checkpoint.lock_folder(folder) if distributed.rank() == 0 else contextlib.nullcontext()
    with lock, Checkpointer(config, folder) as checkpointer:
        # 1. Data and model; every process draws the same weights.
        mixup = build_mixup(config)
        train_loader, val_loader = _build_loaders(config)
        checkpointer.about["classes"] = list(train_loader.dataset.classes)
        utils.seed_everything(config.SEED)
        model = _build_model(config, device)
        resume_path = _find_resume(config, folder)
        if config.MODEL.PRETRAINED and not resume_path:
            _load_pretrained(config, model)
        if config.TRAIN.FREEZE_STAGES and not (config.MODEL.PRETRAINED or resume_path):
            logger.warning("TRAIN.FREEZE_STAGES freezes newly drawn weights; load trained ones with --pretrained")
        if config.TRAIN.SYNC_BN:
            if device.type != "cuda":
                raise ValueError("TRAIN.SYNC_BN is True, but SyncBatchNorm needs CUDA; set it False on the CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.TRAIN.USE_CHECKPOINT:
            count_batches_once(model)

        # 2. The state of the training; from here on every process draws its own random numbers.
        utils.seed_everything(config.SEED + distributed.rank())
        precision = Precision(config.AMP_DTYPE, device)
        optimizer = build_optimizer(config, model)
        updates_per_epoch = -(-len(train_loader) // config.TRAIN.ACCUMULATION_STEPS)
        state = TrainState(
            layout=Layout(
                dataset=config.DATA.DATASET,
                training_images=len(train_loader.dataset),
                num_classes=config.MODEL.NUM_CLASSES,
                seed=config.SEED,
                is_sharded=train_loader.batch_sampler.sharded,
                batch_size=config.DATA.BATCH_SIZE,
                world_size=distributed.world_size(),
                accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
            ),
            model=model,
            optimizer=optimizer,
            lr_scheduler=LRScheduler(config, optimizer, updates_per_epoch),
            scaler=precision.scaler(),
            ema=ModelEmaV3(model, decay=config.TRAIN.EMA.DECAY) if config.TRAIN.EMA.ENABLED else None,
        )
        if resume_path:
            _resume(resume_path, state, checkpointer, folder)
        _describe_run(config, state, device, folder, train_loader)

        # 3. The network as the loop calls it.
        if config.COMPILE:
            model.compile()
        wrapped = model
        if distributed.is_distributed():
            wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

        # 4. The epochs.
        metrics = _open_metrics(config, state, folder) if distributed.rank() == 0 else None
        while state.epoch < config.TRAIN.EPOCHS:
            train_one_epoch(config, state, wrapped, train_loader, mixup, precision, metrics, checkpointer)
            results = _evaluate_all(state.model, state.ema, val_loader, precision)
            accuracy = list(results.values())[-1]["acc1"]  # the average's, where there is one
            best_before, state.max_accuracy = state.max_accuracy, max(accuracy, state.max_accuracy)
            is_best = accuracy > best_before
            _log_results(results, f"epoch {state.epoch - 1}  ", f"  best {state.max_accuracy:.3f}")
            if metrics:
                for name, result in results.items():
                    metrics.write(name, state.step, state.epoch - 1, **result)
            if is_best or state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS:
                if not checkpointer.save(state, is_best):
                    state.max_accuracy = best_before  # best.pth is still the one before
        if metrics:
            metrics.close()
            _draw_curves(folder)
    logger.info(f"Best top-1 {state.max_accuracy:.3f} % in {state.epoch} epochs ({state.step} updates).\n"
                f"{_whereabouts(folder)}")


def evaluate_checkpoint(config, device: torch.device, folder: Path) -> None:
    """Evaluates a checkpoint on the validation set and writes ``eval.json`` into ``folder``."""
    path = Path(config.MODEL.RESUME or config.MODEL.PRETRAINED or folder / checkpoint.BEST)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to evaluate at {path}; name one with --resume")
    content = checkpoint.load_file(path)
    _prepare_data(config)
    loader = build_val_loader(config, distributed.rank(), distributed.world_size())
    model, ema = _build_model(config, device), None
    with _naming(path):
        load_strict(model, adapt_size(model_state_dict(content), model))
        if content.get("model_ema"):
            ema = ModelEmaV3(model)
            load_strict(ema.module, adapt_size(content["model_ema"], model, warn=False))
            _as_evaluated(config, ema.module)
    _as_evaluated(config, model)
    precision = Precision(config.AMP_DTYPE, device)
    predictions = [] if config.TEST.PREDICTIONS else None
    results = _evaluate_all(model, ema, loader, precision, predictions)
    _log_results(results)
    if distributed.rank() == 0:
        report = results | {
            "checkpoint": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "environment": utils.describe_environment(device),
            "config": to_dict(config),
        }
        (folder / "eval.json").write_text(json.dumps(report, indent=2) + "\n")
        logger.info(f"results written to {folder / 'eval.json'}")
    if config.TEST.PREDICTIONS:
        _write_predictions(folder / "predictions.csv", loader.dataset, predictions)


def throughput(config, device: torch.device) -> None:
    """Logs images per second of the forward pass, on random images of the config's size and batch size."""
    model = _as_evaluated(config, _build_model(config, device))
    images = torch.randn(config.DATA.BATCH_SIZE, *image_shape(config), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    precision = Precision(config.AMP_DTYPE, device)
    speed = measure_throughput(model, images, precision)
    logger.info(f"{config.MODEL.NAME}: {speed:.1f} images/s, batch size {len(images)}, {precision.name}, "
                f"{utils.describe_environment(device)['device']}")


def _open_output_folder(config) -> Path:
    """The run's output folder, made where it is not there yet; the log goes into it from here on."""
    folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        add_log_file(folder / f"log_rank{distributed.rank()}.txt")
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error}); choose another --output") from None
    return folder


@contextlib.contextmanager
def _naming(path: Path | str):
    """Puts the name of a checkpoint before an error about its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _prepare_data(config) -> None:
    if distributed.rank() == 0:
        prepare_data(config)
    distributed.barrier()
    if distributed.local_rank() == 0 and distributed.rank() != 0:  # a machine that does not share the first one's disk
        prepare_data(config)
    distributed.barrier()


def _build_loaders(config):
    _prepare_data(config)
    share = distributed.rank(), distributed.world_size()
    return build_train_loader(config, *share), build_val_loader(config, *share)


def _build_model(config, device: torch.device) -> nn.Module:
    torch.backends.cudnn.benchmark = not config.DETERMINISTIC  # the fastest algorithms: every batch has the same shape
    return build_model(config).to(device, memory_format=torch.channels_last)


def _as_evaluated(config, model: nn.Module) -> nn.Module:
    """The network in its inference form and compiled, where the config says so."""
    if config.TEST.FUSE:
        if not hasattr(model, "fuse"):
            raise ValueError(f"TEST.FUSE is True, but {config.MODEL.NAME} has no inference form; set it False")
        model.fuse()
    if config.COMPILE:
        model.compile()
    return model


def _describe_run(config, state: TrainState, device, folder: Path, train_loader) -> None:
    """Logs what is trained and where, and saves it as YAML: ``config.yaml`` can be run again with ``--cfg``."""
    if distributed.rank() != 0:
        return
    layout = state.layout
    try:
        macs = utils.count_macs(state.model, image_shape(config))
    except AssertionError as error:  # a timm model's, about its input
        name, size = config.MODEL.NAME, config.DATA.IMG_SIZE
        raise ValueError(f"MODEL.NAME {name} does not take a DATA.IMG_SIZE of {size}: {error}") from error
    run = utils.describe_environment(device) | {
        "command": " ".join(sys.argv),
        "effective_batch": layout.images_per_batch * layout.accumulation_steps,
        "base_lr": config.TRAIN.BASE_LR,
        "updates_per_epoch": state.lr_scheduler.steps_per_epoch,
        "training_images": layout.training_images,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "frozen_parameters": sum(p.numel() for p in state.model.parameters() if not p.requires_grad),
        "macs": macs,
        "amp_dtype": Precision(config.AMP_DTYPE, device).name,
        "classes": list(train_loader.dataset.classes),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    logger.info("config:\n%s", yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None))
    for key, value in run.items():
        if key != "classes":
            logger.info(f"{key}: {value}")
    frozen = f", {run['frozen_parameters'] / 1e6:.2f} M of them frozen" if run["frozen_parameters"] else ""
    logger.info(f"{run['parameters'] / 1e6:.2f} M parameters{frozen}; "
                f"{run['macs'] / 1e9:.3f} G multiply-accumulates an image")


def _open_metrics(config, state: TrainState, folder: Path) -> MetricsWriter:
    wandb_run = None
    if config.WANDB_PROJECT:
        name = f"{config.MODEL.NAME}/{config.TAG}"
        wandb_run = start_wandb(config.WANDB_PROJECT, name, to_dict(config), folder)
    return MetricsWriter(folder, state.epoch, state.step, wandb_run)


def _draw_curves(folder: Path) -> None:
    """Draws the run's curves into its folder; a training does not fail for whatever a picture fails for."""
    try:
        plots.save_figure(plots.draw_curves({folder.name: plots.read_metrics(folder)}), folder / "curves.png")
    except Exception as error:
        logger.warning(f"the curves were not drawn: {error}")
        logger.debug("where it happened:", exc_info=True)


def _whereabouts(folder: Path) -> str:
    """A line for each thing that a run has left in its folder."""
    places = [
        ("best checkpoint", folder / checkpoint.BEST),
        *(("newest checkpoint", path) for path in checkpoint.list_checkpoints(folder)[:1]),
        ("log", folder / "log_rank0.txt"),
        ("metrics", folder / "metrics.jsonl"),
        ("curves", folder / "curves.png"),
        ("TensorBoard events", folder / "tensorboard"),
        ("Weights & Biases", folder / "wandb"),
    ]
    return "\n".join(f"  {what:<18}  {path}" for what, path in places if path.exists())


def _load_pretrained(config, model: nn.Module) -> None:
    content = checkpoint.load_file(config.MODEL.PRETRAINED)
    with _naming(config.MODEL.PRETRAINED):
        skipped = load_pretrained(model, content)
    logger.info(f"loaded the weights of {config.MODEL.PRETRAINED}")
    if skipped:
        logger.info(f"its head has another number of classes and is drawn anew: {', '.join(skipped)}")


def _find_resume(config, folder: Path) -> Path | str:
    """The newest good checkpoint in ``folder``, else the one that the config names; empty where there is neither."""
    newest = None
    if config.TRAIN.AUTO_RESUME:
        newest = distributed.broadcast_object(checkpoint.newest_checkpoint(folder) if distributed.rank() == 0 else None)
        if newest and config.MODEL.RESUME:
            logger.info(f"this run has its own checkpoints; {config.MODEL.RESUME} is not used")
    return newest or config.MODEL.RESUME


def _resume(path: Path | str, state: TrainState, checkpointer: Checkpointer, folder: Path) -> None:
    """Restores a checkpoint and leaves none in ``folder`` that would pass for a later one."""
    content = checkpoint.load_file(path)
    with _naming(path):
        state.load_state_dict(content)
    logger.info(f"resumed {path}: epoch {state.epoch}, {state.step} updates done, best {state.max_accuracy:.3f}")
    if state.step != content["step"]:  # updates are counted otherwise now, so first save the run under its new step
        checkpointer.save(state)
    if distributed.rank() == 0:
        checkpoint.set_aside_after(state.step, folder)


def _evaluate_all(model: nn.Module, ema: ModelEmaV3 | None, loader, precision: Precision, predictions=None) -> dict:
    """The results of the network and, last, of its average where there is one, whose predictions are then recorded."""
    if ema is None:
        return {"eval": evaluate(model, loader, precision, predictions)}
    return {
        "eval": evaluate(model, loader, precision),
        "eval_ema": evaluate(ema.module, loader, precision, predictions),
    }


def _write_predictions(path: Path, dataset, predictions: list) -> None:
    """A line per validation image, in the data set's order, from every process's share of the predictions."""
    shares = distributed.gather_objects(predictions)
    if distributed.rank() != 0:
        return
    classes, paths = dataset.classes, getattr(dataset.images, "samples", None)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "image", "target", "prediction", "probability", "target_label", "prediction_label"])
        for index in range(len(dataset)):
            target, prediction, probability = shares[index % len(shares)][index // len(shares)]
            image = paths[index][0] if paths else ""
            names = classes[target], classes[prediction]
            writer.writerow([index, image, *names, f"{probability:.6f}", target, prediction])
    logger.info(f"predictions written to {path}")


def _log_results(results: dict, before: str = "", after: str = "") -> None:
    for name, result in results.items():
        logger.info(f"{name}: {before}top-1 {result['acc1']:.3f}  top-5 {result['acc5']:.3f}  "
                    f"loss {result['loss']:.4f}  ({result['images']} images){after}")


if __name__ == "__main__":
    sys.exit(main())
