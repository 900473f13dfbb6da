"""The description of a run: versions and machine, ``config.yaml``, ``run.yaml``, its curves, where its results are."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import timm
import torch
import torchvision
import yaml

import checkpoint
import distributed
import plots
import utils
from config import to_dict
from files import write_text
from inference import image_shape
from models import InputError
from train_state import TrainState

logger = logging.getLogger("strip_mlp")


def git_commit() -> str:
    """The commit of this code, with ``-dirty`` after it if files differ from it; ``unknown`` outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_environment(device: torch.device) -> dict:
    """The versions of the packages that a run depends on, and its machine."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
        "git_commit": git_commit(),
        "device": _device_name(device),
        "world_size": distributed.world_size(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def describe_run(config, state: TrainState, device: torch.device, precision: str, about: dict) -> dict:
    """The content of ``run.yaml``.

    Args:
        config, state, device: the run's.
        precision: the name of the forward pass's precision.
        about: what the run's checkpoints record: classes, and changes of its settings on the way.

    Raises:
        InputError: the network does not take images of the config's size.
    """
    layout = state.layout
    try:
        macs = utils.count_macs(state.model, image_shape(config))
    except AssertionError as error:  # a timm model's, about its input
        size = config.DATA.IMG_SIZE
        raise InputError(f"{config.MODEL.ARCH} does not take a DATA.IMG_SIZE of {size}: {error}") from error
    parameters = list(state.model.parameters())
    return describe_environment(device) | {
        "command": " ".join(sys.argv),
        "effective_batch": layout.images_per_batch * layout.accumulation_steps,
        "base_lr": config.TRAIN.BASE_LR,
        "updates_per_epoch": state.lr_scheduler.steps_per_epoch,
        "training_images": layout.training_images,
        "parameters": sum(p.numel() for p in parameters),
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad),
        "macs": macs,
        "amp_dtype": precision,
        "augment_on": layout.augment_on,
        "changes": about["changes"],
        "classes": about["classes"],
    }


def save_description(config, run: dict, folder: Path) -> None:
    """Saves the config and the description of a run as YAML, and logs it; ``--cfg`` accepts ``config.yaml``."""
    write_text(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    write_text(folder / "run.yaml", yaml.safe_dump(run, sort_keys=False))
    logger.info(f"config: {folder / 'config.yaml'}")
    for key, value in run.items():
        if key not in ("classes", "changes"):
            logger.info(f"{key}: {value}")
    frozen = f", {run['frozen_parameters'] / 1e6:.2f} M of them frozen" if run["frozen_parameters"] else ""
    logger.info(f"{run['parameters'] / 1e6:.2f} M parameters{frozen}; "
                f"{run['macs'] / 1e9:.3f} G multiply-accumulates per image")


def draw_curves(folder: Path) -> None:
    """Draws the run's curves into its folder; an error in drawing does not fail the training."""
    try:
        figure = plots.draw_curves({folder.name: plots.read_metrics(folder)})
        path = folder / "curves.png"
        path.unlink(missing_ok=True)  # a link of that name is not followed
        plots.save_figure(figure, path)
    except Exception as error:
        logger.warning(f"the curves were not drawn: {error}")
        logger.debug("where it happened:", exc_info=True)


def whereabouts(folder: Path) -> str:
    """A line for each file that a run has written."""
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
