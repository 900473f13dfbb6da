"""Trains and evaluates Strip-MLP.

One process, on a GPU if there is one, else on the CPU:

    python main.py --cfg configs/smlp_tiny_alpha3_patch4_224_cifar10.yaml --data-path DIR

Eight GPUs of one machine:

    torchrun --nproc_per_node 8 main.py --cfg configs/smlp_base_alpha3_patch4_224_imagenet1k.yaml --data-path DIR

Evaluation of a checkpoint, this project's or a released one:

    python main.py --eval --cfg configs/X.yaml --resume CKPT --data-path DIR
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while PyTorch is imported: no traceback
    try:
        from arguments import argument_parser, parse_arguments

        parse_arguments(argument_parser(__doc__))  # --help and mistyped flags answer before PyTorch is imported
        import models  # noqa: F401, before timm: it checks torchvision
    except ModuleNotFoundError as error:
        raise SystemExit(f"main.py: {error}; activate the environment that has it (source .venv/bin/activate), or run "
                         "pip install -r requirements.txt") from None
    except ImportError as error:
        raise SystemExit(f"main.py: {error}") from None

import contextlib
import csv
import hashlib
import json
import logging
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import checkpoint
import distributed
import engine
import inference
import logger as log
import resume
import utils
from arguments import argument_parser, config_overrides, parse_arguments
from config import load_config, to_dict
from data import augment_on, build_train_loader, build_val_loader, prepare_data
from distributed import choose_device, machine_failures
from lr_scheduler import LRScheduler
from models import count_batches_once, load_pretrained
from optimizer import build_optimizer
from utils import InputError, input_errors

logger = logging.getLogger("strip_mlp")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0; 2 for an error that the user can fix; 1 for a training that failed; 74 for one whose last
        checkpoint could not be saved into its folder; 75 for one that saved itself and stopped on a signal, rerun
        the same command to resume; 130 for an interruption by Ctrl-C.
    """
    args = parse_arguments(argument_parser(__doc__), argv)
    status = 0
    log.setup_console(is_first=os.environ.get("RANK", "0") == "0")
    try:
        if len(tempfile.gettempdir()) > 75:  # the data workers' sockets are in it; they would wait for ever
            raise InputError(f"the temporary folder {tempfile.gettempdir()} has a name of over 75 characters, too long "
                             "for sockets; set TMPDIR to a shorter one")
        config = load_config(args.cfg, config_overrides(args))
        if args.amp_opt_level:
            logger.warning("--amp-opt-level belongs to apex and is ignored; use --amp-dtype {bf16,fp16,fp32}")
        if config.DETERMINISTIC:
            engine.make_deterministic()
        torch.backends.cudnn.benchmark = not config.DETERMINISTIC  # the fastest algorithms: every batch has one shape
        device = choose_device(args.device, distributed.launcher_local_rank())
        distributed.init_distributed(device, config.HANG_MINUTES)
        if args.throughput:
            throughput(config, device)
        else:
            folder = _make_output_folder(config)
            # One run at a time writes into a folder.
            with checkpoint.lock_folder(folder) if distributed.rank() == 0 else contextlib.nullcontext():
                if args.eval:
                    evaluate_checkpoint(config, device, folder)
                else:
                    train(config, device, folder, args.allow_changes)
    except resume.Preempted as stop:
        logger.warning("stopped by %s; rerun the same command to resume", stop)
        status = resume.PREEMPTED
    except resume.NotSavedError as error:
        logger.error(error)
        status = resume.NOT_SAVED
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except Exception as error:
        status = utils.exit_status(error)
        if status is None:
            raise
        logger.error(utils.error_message(error))
        logger.debug("where it happened:", exc_info=True)  # for the log file
        return status  # without leave(), which could wait for processes that wait for this one
    distributed.leave()
    return status


def train(config, device: torch.device, folder: Path, allow_changes: bool = False) -> None:
    """Trains, evaluating after every epoch; resumes from the newest checkpoint in ``folder``.

    If that is from a run with other settings, it is an InputError, unless ``allow_changes`` is set.
    """
    with machine_failures(), resume.Checkpointer(config, folder) as checkpointer:
        # 0. The run so far.
        resume_path, resume_content, changes = resume.find_resume(config, folder, allow_changes)
        checkpointer.metadata["changes"] = changes

        # 1. Data and model; every process initialises the same weights.
        distributed.once_per_machine(lambda: prepare_data(config))
        train_loader = build_train_loader(config, distributed.rank(), distributed.world_size(), device)
        val_loader = build_val_loader(config, distributed.rank(), distributed.world_size(), device)
        classes = list(train_loader.dataset.classes)
        checkpointer.metadata |= {"classes": classes, "fingerprint": train_loader.dataset.fingerprint}
        if resume_content:
            resume.check_data(resume_content, resume_path, classes, train_loader.dataset.fingerprint)
        if distributed.broadcast_object(resume.is_finished(resume_content, config, len(train_loader.dataset))):
            _report_finished(resume_content, folder)
            return
        resume.seed_everything(config.SEED)
        model = engine.to_device(inference.build_network(config), device)
        if config.MODEL.PRETRAINED and not resume_path:
            _load_pretrained(config, model)
        if config.TRAIN.WARMUP_EPOCHS == config.TRAIN.EPOCHS:
            logger.warning(f"all {config.TRAIN.EPOCHS} epochs are warm-up, so the learning rate only rises; for a "
                           "short run add --opts TRAIN.WARMUP_EPOCHS 0")
        if config.TRAIN.FREEZE_STAGES and not (config.MODEL.PRETRAINED or resume_path):
            logger.warning("TRAIN.FREEZE_STAGES freezes newly initialised weights; load trained ones with --pretrained")
        if config.TRAIN.SYNC_BN:
            if device.type != "cuda":
                raise InputError("TRAIN.SYNC_BN is True, but SyncBatchNorm needs CUDA; set it to False on the CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.TRAIN.USE_CHECKPOINT:
            count_batches_once(model)

        # 2. The state of the training; from here on every process draws its own random numbers.
        resume.seed_everything(config.SEED + distributed.rank())
        precision = engine.Precision(config.AMP_DTYPE, device)
        logger.info(f"precision: {precision.name} ({precision.reason})")
        optimizer = build_optimizer(config, model)
        updates_per_epoch = -(-len(train_loader) // config.TRAIN.ACCUMULATION_STEPS)
        state = resume.TrainState(
            layout=resume.Layout(
                dataset=config.DATA.DATASET,
                training_images=len(train_loader.dataset),
                num_classes=config.MODEL.NUM_CLASSES,
                seed=config.SEED,
                is_sharded=train_loader.batch_sampler.sharded,
                batch_size=config.DATA.BATCH_SIZE,
                world_size=distributed.world_size(),
                accumulation_steps=config.TRAIN.ACCUMULATION_STEPS,
                augment_on=augment_on(config, device),
            ),
            model=model,
            optimizer=optimizer,
            lr_scheduler=LRScheduler(config, optimizer, updates_per_epoch),
            scaler=precision.scaler(),
            ema=engine.build_ema(config, model),
        )
        if resume_path:
            resume.resume(resume_path, resume_content, state, checkpointer)
        del resume_content  # it is as large as the state
        metrics = None
        log.open_log(folder)
        if distributed.rank() == 0:
            run = log.describe_run(config, state, device, precision.name, checkpointer.metadata)
            log.save_description(config, run, folder)
            wandb_run = None
            if config.WANDB_PROJECT:
                name = f"{config.MODEL.NAME}/{config.TAG}"
                wandb_run = log.start_wandb(config.WANDB_PROJECT, name, to_dict(config), folder)
            metrics = log.MetricsWriter(folder, state.epoch + state.batch / len(train_loader), state.step, wandb_run)
        if resume_path:
            best = "none yet" if state.max_accuracy < 0 else f"{state.max_accuracy:.3f}"
            logger.info(f"resumed {resume_path}: epoch {state.epoch}, {state.step} updates done, best {best}")

        # 3. The network as the loop calls it.
        wrapped = engine.compile_network(model, config.COMPILE, device, config.DETERMINISTIC)
        if distributed.is_distributed():
            wrapped = distributed.wrap(wrapped)

        # 4. The epochs.
        while state.epoch < config.TRAIN.EPOCHS:
            engine.train_one_epoch(config, state, wrapped, train_loader, precision, metrics, checkpointer)
            try:
                results = engine.evaluate_all(state.networks(), val_loader, precision)
            except InputError:  # e.g. an unreadable image; the rerun starts with this evaluation
                checkpointer.save(state)
                raise
            best_before = state.max_accuracy, state.best_loss
            is_best, checkpointer.metadata["is_average_best"] = state.finish_epoch(results)
            engine.log_results(results, f"epoch {state.epoch - 1}  ", f"  best {state.max_accuracy:.3f}")
            if metrics:
                for name, result in results.items():
                    metrics.write(name, state.step, state.epoch - 1, state.epoch, **result)
            if not any(math.isfinite(result["loss"]) for result in results.values()):
                raise FloatingPointError(
                    f"the network's outputs are not finite after epoch {state.epoch - 1}, which is not saved; use a "
                    "lower TRAIN.BASE_LR or a longer TRAIN.WARMUP_EPOCHS")
            if is_best or state.epoch % config.SAVE_FREQ == 0 or state.epoch == config.TRAIN.EPOCHS:
                if not checkpointer.save(state, is_best, is_last=state.epoch == config.TRAIN.EPOCHS):
                    state.max_accuracy, state.best_loss = best_before  # best.pth is still the one before
        if not distributed.broadcast_object(checkpoint.list_checkpoints(folder)):  # nothing was left to train
            checkpointer.save(state, is_last=True)
        if metrics:
            metrics.close()
            log.draw_curves(folder)
    logger.info(f"Best top-1 {state.max_accuracy:.3f} % in {state.epoch} epochs ({state.step} updates).\n"
                f"{log.whereabouts(folder)}")


@machine_failures()
def evaluate_checkpoint(config, device: torch.device, folder: Path) -> None:
    """Evaluates a checkpoint on the validation set and writes ``eval.json`` into ``folder``."""
    path = inference.weights_file(config.MODEL.RESUME or config.MODEL.PRETRAINED or folder / checkpoint.BEST)
    if not path.is_file():
        raise utils.MissingFileError(f"no checkpoint to evaluate at {path}; name one with --resume")
    logger.info(f"evaluating {path}")
    content, config, saved_classes = inference.read_network(path, config)
    distributed.once_per_machine(lambda: prepare_data(config))
    loader = build_val_loader(config, distributed.rank(), distributed.world_size(), device)
    precision = engine.Precision(config.AMP_DTYPE, device)
    logger.info(f"precision: {precision.name} ({precision.reason})")
    with input_errors(path):
        inference.check_classes(saved_classes, loader.dataset.classes)
    networks = {}
    for name, weights in (("eval", content["model"]), ("eval_ema", content["model_ema"])):
        if weights is not None:
            network = engine.to_device(inference.build_with_weights(path, weights, config, warn=not networks), device)
            if config.COMPILE == "on":  # auto compiles only for training
                network.compile(options=engine.OPTIONS)
            networks[name] = network
    log.open_log(folder)
    predictions = []  # of the network that tools/predict.py uses
    name = "eval_ema" if inference.predicts_by_average(content) else "eval"
    wanted = {name: predictions} if config.TEST.PREDICTIONS else {}
    results = engine.evaluate_all(networks, loader, precision, wanted)
    engine.log_results(results)
    if not all(math.isfinite(result["loss"]) for result in results.values()):
        hint = "" if precision.name == "fp32" else "try --amp-dtype fp32, or "
        raise InputError(f"{path}: the network's outputs overflow in {precision.name}, so its accuracy is meaningless; "
                         f"{hint}use an earlier checkpoint")
    if distributed.rank() == 0:
        report = results | {
            "checkpoint": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "environment": log.describe_environment(device),
            "config": to_dict(config),
        }
        utils.write_text(folder / "eval.json", json.dumps(report, indent=2) + "\n")
        logger.info(f"results written to {folder / 'eval.json'}")
    if config.TEST.PREDICTIONS:
        _write_predictions(folder / "predictions.csv", loader.dataset, predictions)


@machine_failures()
def throughput(config, device: torch.device) -> None:
    """Logs images per second of the forward pass, on random images of the config's size and batch size."""
    precision = engine.Precision(config.AMP_DTYPE, device)
    model = engine.to_device(inference.build_network(config), device)
    if config.COMPILE == "on":
        model.compile(options=engine.OPTIONS)
    images = torch.randn(config.DATA.BATCH_SIZE, *inference.image_shape(config), device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    speed = engine.measure_throughput(model, images, precision)
    logger.info(f"{config.MODEL.NAME}: {speed:.1f} images/s, batch size {len(images)}, {precision.name}, "
                f"{log.describe_environment(device)['device']}")


def _write_predictions(path: Path, dataset, predictions: list) -> None:
    """Writes a line per validation image, in the data set's order, from every process's share of the predictions."""
    shares = distributed.gather_objects(predictions)
    if distributed.rank() != 0:
        return
    classes = dataset.classes
    with utils.replacing(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "image", "target", "prediction", "probability", "target_label", "prediction_label"])
        for index in range(len(dataset)):
            target, prediction, probability = shares[index % len(shares)][index // len(shares)]
            if target < 0:  # it could not be read
                continue
            image = dataset.name(index)
            names = classes[target], classes[prediction]
            writer.writerow([index, *map(utils.csv_cell, (image, *names)), f"{probability:.6f}", target, prediction])
    logger.info(f"predictions written to {path}")


def _make_output_folder(config) -> Path:
    """The run's output folder, created if necessary."""
    folder = Path(config.OUTPUT, config.MODEL.NAME, config.TAG)
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # TensorBoard would fail on it, late
        raise InputError(f"{folder} is not UTF-8; choose another --output, or set PYTHONUTF8=1 in the environment if "
                         "the locale is the cause") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {folder} ({error}); choose another --output") from None
    return folder


def _load_pretrained(config, model: nn.Module) -> None:
    content = checkpoint.load_file(inference.weights_file(config.MODEL.PRETRAINED))
    with input_errors(config.MODEL.PRETRAINED):
        skipped = load_pretrained(model, content)
    logger.info(f"loaded the weights of {config.MODEL.PRETRAINED}")
    if skipped:
        logger.info(f"the class count differs, so the head is re-initialised: {', '.join(skipped)}")


def _report_finished(content: dict | None, folder: Path) -> None:
    """Logs the result of a finished run, on the first process, which has read its last checkpoint."""
    if distributed.rank() == 0:
        if not (folder / "curves.png").is_file():  # the run was killed after its last checkpoint
            log.draw_curves(folder)
        logger.info(f"this run is finished, nothing was trained: best top-1 {content['max_accuracy']:.3f} % in "
                    f"{content['epoch']} epochs ({content['step']} updates). To continue training, raise TRAIN.EPOCHS "
                    f"and add --allow-changes.\n{log.whereabouts(folder)}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() reports it
    sys.exit(main())
