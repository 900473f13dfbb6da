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
import utils
from checkpointer import PREEMPTED, Checkpointer, Preempted
from config import load_config, nearest, to_dict
from data import build_mixup, build_train_loader, build_val_loader, prepare_data
from engine import Precision, evaluate, measure_throughput, train_one_epoch
from logger import MetricsWriter, add_log_file, setup_console
from lr_scheduler import LRScheduler
from models import build_model, load_pretrained, load_strict, model_state_dict
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
        itself and stopped on a signal, to go on with the same command.
    """
    args = parse_arguments(argv)
    setup_console(int(os.environ.get("RANK", 0)))
    try:
        config = load_config(args.cfg, config_overrides(args))
        if args.amp_opt_level:
            logger.warning("--amp-opt-level belongs to apex and is ignored; use --amp-dtype {bf16,fp16,fp32}")
        device = utils.init_distributed(args.device)
        if args.throughput:
            throughput(config, device)
        else:
            folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
            folder.mkdir(parents=True, exist_ok=True)
            add_log_file(folder / f"log_rank{utils.rank()}.txt")
            (evaluate_checkpoint if args.eval else train)(config, device, folder)
    except Preempted as signal:
        logger.warning("stopped by %s; the same command goes on from here", signal)
        return PREEMPTED
    except (ValueError, OSError, FloatingPointError) as error:
        # What a data worker raises arrives with the worker's traceback before it.
        logger.error(str(error).splitlines()[-1] if "Original Traceback" in str(error) else str(error))
        logger.debug("where it happened:", exc_info=True)  # for the log file
        return 1 if isinstance(error, FloatingPointError) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def train(config, device: torch.device, folder: Path) -> None:
    """Trains, evaluating after every epoch; goes on from the newest checkpoint in ``folder``."""
    lock = checkpoint.lock_folder(folder) if utils.rank() == 0 else contextlib.nullcontext()
    with lock, Checkpointer(config, folder) as checkpointer:
        # 1. Data and model; every process draws the same weights.
        train_loader, val_loader = _build_loaders(config)
        utils.seed_everything(config.SEED)
        model = _build_model(config, device)
        updates_per_epoch = -(-len(train_loader) // config.TRAIN.ACCUMULATION_STEPS)
        _describe_run(config, model, device, folder, train_loader, updates_per_epoch)
        if config.MODEL.PRETRAINED:
            _load_pretrained(config, model)
        if config.TRAIN.SYNC_BN and utils.world_size() > 1:
            if device.type != "cuda":
                raise ValueError("TRAIN.SYNC_BN is True, but SyncBatchNorm needs CUDA; set it False on the CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

        # 2. The state of the training; from here on every process draws its own random numbers.
        utils.seed_everything(config.SEED + utils.rank())
        precision = Precision(config.AMP_DTYPE, device)
        optimizer = build_optimizer(config, model)
        state = TrainState(
            layout=Layout(len(train_loader.dataset), config.MODEL.NUM_CLASSES, config.DATA.BATCH_SIZE,
                          utils.world_size(), config.TRAIN.ACCUMULATION_STEPS),
            model=model,
            optimizer=optimizer,
            lr_scheduler=LRScheduler(config, optimizer, updates_per_epoch),
            scaler=precision.scaler(),
            ema=ModelEmaV3(model, decay=config.TRAIN.EMA.DECAY) if config.TRAIN.EMA.ENABLED else None,
        )
        _resume(config, state, folder)

        # 3. The network as the loop calls it.
        if config.COMPILE:
            model.compile()
        wrapped = model
        if utils.world_size() > 1:
            wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

        # 4. The epochs.
        mixup = build_mixup(config)
        metrics = MetricsWriter(folder, state.step, is_evaluated=state.batch == 0) if utils.rank() == 0 else None
        while state.epoch < config.TRAIN.EPOCHS:
            train_one_epoch(config, state, wrapped, train_loader, mixup, precision, metrics, checkpointer)
            results = _evaluate_all(state.model, state.ema, val_loader, precision)
            accuracy = list(results.values())[-1]["acc1"]  # the average's, where there is one
            is_best = accuracy > state.max_accuracy
            state.max_accuracy = max(accuracy, state.max_accuracy)
            _log_results(results, f"epoch {state.epoch - 1}  ", f"  best {state.max_accuracy:.3f}")
            if metrics:
                for name, result in results.items():
                    metrics.write(name, state.step, state.epoch - 1, **result)
            if is_best or state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS:
                checkpointer.save(state, is_best)
        if metrics:
            metrics.close()
    logger.info(f"Best top-1 {state.max_accuracy:.3f} % in {state.epoch} epochs ({state.step} updates).\n"
                f"  best checkpoint  {folder / checkpoint.BEST}\n"
                f"  log              {folder / 'log_rank0.txt'}\n"
                f"  curves' data     {folder / 'metrics.jsonl'}\n"
                f"  TensorBoard      tensorboard --logdir {folder / 'tensorboard'}")


def evaluate_checkpoint(config, device: torch.device, folder: Path) -> None:
    """Evaluates a checkpoint on the validation set and writes ``eval.json`` into ``folder``."""
    path = Path(config.MODEL.RESUME or config.MODEL.PRETRAINED or folder / checkpoint.BEST)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to evaluate at {path}; name one with --resume")
    content = checkpoint.load_file(path)
    _prepare_data(config)
    loader = build_val_loader(config, utils.rank(), utils.world_size())
    model = _build_model(config, device)
    load_strict(model, model_state_dict(content))
    ema = None
    if content.get("model_ema"):
        ema = ModelEmaV3(model)
        load_strict(ema.module, content["model_ema"])
    if config.COMPILE:
        model.compile()
    precision = Precision(config.AMP_DTYPE, device)
    predictions = [] if config.TEST.PREDICTIONS else None
    results = _evaluate_all(model, ema, loader, precision, predictions)
    _log_results(results)
    if utils.rank() == 0:
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
    model = _build_model(config, device)
    if config.COMPILE:
        model.compile()
    images = torch.randn(config.DATA.BATCH_SIZE, *_image_shape(config), device=device)
    precision = Precision(config.AMP_DTYPE, device)
    speed = measure_throughput(model, images, precision)
    logger.info(f"{config.MODEL.NAME}: {speed:.1f} images/s, batch size {len(images)}, {precision.name}, "
                f"{utils.describe_environment(device)['device']}")


def _prepare_data(config) -> None:
    if utils.local_rank() == 0:
        prepare_data(config)
    utils.barrier()


def _build_loaders(config):
    _prepare_data(config)
    share = utils.rank(), utils.world_size()
    return build_train_loader(config, *share), build_val_loader(config, *share)


def _build_model(config, device: torch.device) -> nn.Module:
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    return build_model(config).to(device)


def _image_shape(config) -> tuple[int, int, int]:
    return config.MODEL.STRIP_MLP.IN_CHANS, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE


def _describe_run(config, model, device, folder: Path, train_loader, updates_per_epoch: int) -> None:
    """Logs what is trained and where, and saves it as YAML: ``config.yaml`` can be run again with ``--cfg``."""
    if utils.rank() != 0:
        return
    effective_batch = config.DATA.BATCH_SIZE * utils.world_size() * config.TRAIN.ACCUMULATION_STEPS
    run = utils.describe_environment(device) | {
        "command": " ".join(sys.argv),
        "effective_batch": effective_batch,
        "base_lr": config.TRAIN.BASE_LR,
        "updates_per_epoch": updates_per_epoch,
        "training_images": len(train_loader.dataset),
        "classes": list(train_loader.dataset.classes),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "macs": utils.count_macs(model, _image_shape(config)),
        "amp_dtype": Precision(config.AMP_DTYPE, device).name,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    (folder / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    logger.info("config:\n%s", yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None))
    for key, value in run.items():
        if key != "classes":
            logger.info(f"{key}: {value}")
    logger.info(f"{run['parameters'] / 1e6:.2f} M parameters, {run['macs'] / 1e9:.3f} G multiply-accumulates an image")


def _load_pretrained(config, model: nn.Module) -> None:
    skipped = load_pretrained(model, checkpoint.load_file(config.MODEL.PRETRAINED))
    logger.info(f"loaded the weights of {config.MODEL.PRETRAINED}")
    if skipped:
        logger.info(f"its head has another number of classes and is drawn anew: {', '.join(skipped)}")


def _resume(config, state: TrainState, folder: Path) -> None:
    """Restores the newest checkpoint in ``folder``, else the one that the config names, if any."""
    path = None
    if config.TRAIN.AUTO_RESUME:
        path = utils.broadcast_object(checkpoint.newest_checkpoint(folder) if utils.rank() == 0 else None)
        if path and config.MODEL.RESUME:
            logger.info(f"this run has its own checkpoints; {config.MODEL.RESUME} is not used")
    path = path or config.MODEL.RESUME
    if path:
        state.load_state_dict(checkpoint.load_file(path))
        logger.info(f"resumed {path}: epoch {state.epoch}, {state.step} updates done, best {state.max_accuracy:.3f}")


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
    shares = utils.gather_objects(predictions)
    if utils.rank() != 0:
        return
    classes, paths = dataset.classes, getattr(dataset.images, "samples", None)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "image", "target", "prediction", "probability"])
        for index in range(len(dataset)):
            target, prediction, probability = shares[index % len(shares)][index // len(shares)]
            image = paths[index][0] if paths else ""
            writer.writerow([index, image, classes[target], classes[prediction], f"{probability:.6f}"])
    logger.info(f"predictions written to {path}")


def _log_results(results: dict, before: str = "", after: str = "") -> None:
    for name, result in results.items():
        logger.info(f"{name}: {before}top-1 {result['acc1']:.3f}  top-5 {result['acc5']:.3f}  "
                    f"loss {result['loss']:.4f}  ({result['images']} images){after}")


if __name__ == "__main__":
    sys.exit(main())
