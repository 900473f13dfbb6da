"""Evaluating a checkpoint: results of the network and of its averaged weights, ``eval.json``, predictions."""

import csv
import hashlib
import json
import logging
import math
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

import checkpoint
import distributed
from compiling import OPTIONS
from config import to_dict
from data import build_val_loader, prepare_data
from device import settle_form
from engine import Precision, evaluate
from errors import machine_failures
from files import replacing, write_text
from hub import weights_file
from logger import open_log
from models import InputError, MissingFileError, adapt_size, build_model, load_strict, model_state_dict
from report import describe_environment
from safe_text import csv_cell, printable
from trust import class_names

logger = logging.getLogger("strip_mlp")


@machine_failures()
def evaluate_checkpoint(config, device: torch.device, folder: Path) -> None:
    """Evaluates a checkpoint on the validation set and writes ``eval.json`` into ``folder``.

    Raises:
        InputError: there is no checkpoint, it does not fit the config or the data set, or its network overflows.
    """
    path = weights_file(config.MODEL.RESUME or config.MODEL.PRETRAINED or folder / checkpoint.BEST)
    if not path.is_file():
        raise MissingFileError(f"no checkpoint to evaluate at {path}; name one with --resume")
    logger.info(f"evaluating {path}")
    content = checkpoint.load_file(path)
    _warn_of_other_data(content, config, path)
    distributed.once_per_machine(lambda: prepare_data(config))
    loader = build_val_loader(config, distributed.rank(), distributed.world_size(), device)
    precision = Precision(config.AMP_DTYPE, device)
    logger.info(f"precision: {precision.name} ({precision.reason})")
    model, ema = build_model(config).to(device, memory_format=torch.channels_last), None
    settle_form(config, model, device, precision.dtype)
    with checkpoint.naming(path):
        _check_classes(content.get("classes"), loader.dataset.classes)
        load_strict(model, adapt_size(model_state_dict(content), model))
        if content.get("model_ema") is not None:
            ema = ModelEmaV3(model)
            average = model_state_dict({"model": content["model_ema"]})
            load_strict(ema.module, adapt_size(average, model, warn=False))
            inference_form(config, ema.module)
    inference_form(config, model)
    open_log(folder)
    predictions = [] if config.TEST.PREDICTIONS else None
    results = evaluate_all(model, ema, loader, precision, predictions)
    log_results(results)
    if not all(math.isfinite(result["loss"]) for result in results.values()):
        hint = "" if precision.name == "fp32" else "try --amp-dtype fp32, or "
        raise InputError(f"{path}: the network's outputs overflow in {precision.name}, so its accuracy is meaningless; "
                         f"{hint}use an earlier checkpoint")
    if distributed.rank() == 0:
        report = results | {
            "checkpoint": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "environment": describe_environment(device),
            "config": to_dict(config),
        }
        write_text(folder / "eval.json", json.dumps(report, indent=2) + "\n")
        logger.info(f"results written to {folder / 'eval.json'}")
    if config.TEST.PREDICTIONS:
        _write_predictions(folder / "predictions.csv", loader.dataset, predictions)


def inference_form(config, model: nn.Module) -> nn.Module:
    """The network, fused (TEST.FUSE) and compiled (COMPILE on; auto compiles only for training)."""
    if config.TEST.FUSE:
        if not hasattr(model, "fuse"):
            raise InputError(f"TEST.FUSE is True, but {config.MODEL.NAME} has no inference form; set it False")
        model.fuse()
    if config.COMPILE == "on":
        model.compile(options=OPTIONS)
    return model


def evaluate_all(model: nn.Module, ema: ModelEmaV3 | None, loader, precision: Precision, predictions=None) -> dict:
    """The results of the network and, last, of its average if there is one; the predictions are those of the last."""
    if ema is None:
        return {"eval": evaluate(model, loader, precision, predictions)}
    return {
        "eval": evaluate(model, loader, precision),
        "eval_ema": evaluate(ema.module, loader, precision, predictions),
    }


def log_results(results: dict, before: str = "", after: str = "") -> None:
    """A log line for each network evaluated."""
    for name, result in results.items():
        logger.info(f"{name}: {before}top-1 {result['acc1']:.3f}  top-5 {result['acc5']:.3f}  "
                    f"loss {result['loss']:.4f}  ({result['images']} images){after}")


def _warn_of_other_data(content: dict, config, path: Path) -> None:
    """Warns, before any data is read, if a checkpoint names another kind of data set than the config."""
    saved = content.get("config")
    group = saved.get("DATA") if isinstance(saved, dict) else None
    name = group.get("DATASET") if isinstance(group, dict) else None
    if isinstance(name, str) and name != config.DATA.DATASET:
        logger.warning(f"{path} was trained with DATA.DATASET {printable(name)[:60]}, but --cfg sets "
                       f"{config.DATA.DATASET}; is this the right --cfg?")


def _check_classes(saved, found: list[str]) -> None:
    """Raises InputError if the data set's classes have other names than those that the network was trained on."""
    labels = [str(label) for label in range(len(found))]  # the names of a data set without class names
    if saved is None:
        return
    saved = class_names(saved, len(found))
    if saved not in (labels, list(found)) and list(found) != labels:
        label = next(i for i, (one, other) in enumerate(zip(saved, found, strict=True)) if one != other)
        raise InputError(
            f"its classes differ from the data set's: label {label} is {saved[label]!r} in the checkpoint "
            f"and {found[label]!r} in the data set; check --data-path, or rename the class folders"
        )


def _write_predictions(path: Path, dataset, predictions: list) -> None:
    """Writes a line per validation image, in the data set's order, from every process's share of the predictions."""
    shares = distributed.gather_objects(predictions)
    if distributed.rank() != 0:
        return
    classes = dataset.classes
    with replacing(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "image", "target", "prediction", "probability", "target_label", "prediction_label"])
        for index in range(len(dataset)):
            target, prediction, probability = shares[index % len(shares)][index // len(shares)]
            image = dataset.images.name(index)
            names = classes[target], classes[prediction]
            writer.writerow([index, *map(csv_cell, (image, *names)), f"{probability:.6f}", target, prediction])
    logger.info(f"predictions written to {path}")
