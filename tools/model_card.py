"""The description of a shared network: timm's ``config.json``, and a model card with details from the run's folder."""

import hashlib
import json
from pathlib import Path

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import checkpoint
from config import load_config, read_yaml
from inference import predicts_by_average, weights_file
from models import timm_arguments
from plots import parse_metrics
from utils import InputError, input_errors, printable


def preprocessing(config) -> dict:
    """How an image becomes the network's input, in timm's words: resize its shorter side to the input's side divided by
    ``crop_pct`` and crop the centre, or with ``squash`` resize it to the input's size; divide by 255; normalise."""
    size = config.DATA.IMG_SIZE
    return {
        "input_size": [config.MODEL.STRIP_MLP.IN_CHANS, size, size],
        "crop_pct": 224 / 256 if config.TEST.CROP else 1.0,
        "crop_mode": "center" if config.TEST.CROP else "squash",
        "interpolation": "bicubic" if config.DATA.INTERPOLATION == "random" else config.DATA.INTERPOLATION,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }


def timm_config(config, classes: list[str]) -> dict:
    """``config.json`` of a folder that timm loads; an InputError if timm has no name for the network."""
    with input_errors():
        architecture, arguments = timm_arguments(config)
    known = timm.get_pretrained_cfg(architecture)
    return {
        "architecture": architecture,
        "num_classes": arguments.pop("num_classes"),
        "model_args": arguments,
        "label_names": classes,
        "pretrained_cfg": preprocessing(config) | {
            "fixed_input_size": known.fixed_input_size, "first_conv": known.first_conv, "classifier": known.classifier,
        },
    }


def model_card(source: str | Path, config, weights: Path) -> str:
    """The ``README.md`` of a shared network, in Markdown with the Hub's header.

    The details come from the run's ``config.yaml``, ``run.yaml`` and ``eval.json`` beside the checkpoint ``source``;
    ``weights`` is the shared file.
    """
    path = weights_file(source)
    architecture, arguments = timm_arguments(config)
    run_file, recipe_file, unknown = path.parent / "run.yaml", path.parent / "config.yaml", "not recorded"
    run = read_yaml(run_file) if run_file.is_file() else {}
    if not isinstance(run, dict):
        raise InputError(f"{run_file} does not describe a run; move it away")
    recipe = load_config(recipe_file) if recipe_file.is_file() else None
    rows = {
        "network": f"{config.MODEL.NAME}: timm's `{architecture}` with {json.dumps(arguments)}",
        "input": f"{config.DATA.IMG_SIZE}x{config.DATA.IMG_SIZE} pixels; `config.json` says how to prepare images",
        "data": f"{config.DATA.DATASET}, {run.get('training_images', unknown)} training images, "
                f"{config.MODEL.NUM_CLASSES} classes",
        "recipe": _recipe(recipe, run.get("effective_batch", unknown)) if recipe else unknown,
        "seed": recipe.SEED if recipe else unknown,
        "accuracy": _accuracy(path),
        "commit": run.get("git_commit", unknown),
        "SHA-256 of the weights": f"`{_sha256(weights)}`",
    }
    cells = {name: printable(str(value)).replace("|", r"\|") for name, value in rows.items()}
    table = "".join(f"| {name} | {value} |\n" for name, value in cells.items())
    registers = "import models  # registers the network; from this repository, or: import strip_mlp\n"
    return f"""---
license: mit
library_name: timm
pipeline_tag: image-classification
tags: [timm, image-classification]
---
# {config.MODEL.NAME}

| | |
|---|---|
{table}
```python
import timm
{registers if _is_ours(architecture) else ""}\
net = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"
```

The weights are under the MIT licence, like the code that trained them. The training images have their own terms.
"""


def _is_ours(architecture: str) -> bool:
    return timm.models.model_entrypoint(architecture).__module__.split(".")[0] != "timm"


def _recipe(config, batch) -> str:
    train, aug = config.TRAIN, config.AUG
    start = f", from the weights {Path(config.MODEL.PRETRAINED).name}" if config.MODEL.PRETRAINED else ""
    return (
        f"{train.EPOCHS} epochs{start}, {train.OPTIMIZER.NAME}, {batch} images per update, learning rate "
        f"{train.BASE_LR:g} ({train.LR_SCHEDULER.NAME}, {train.WARMUP_EPOCHS} warm-up epochs), weight decay "
        f"{train.WEIGHT_DECAY:g}, drop path {config.MODEL.DROP_PATH_RATE:g}, label smoothing "
        f"{config.MODEL.LABEL_SMOOTHING:g}, RandAugment {aug.AUTO_AUGMENT}, random erasing {aug.REPROB:g}, mixup "
        f"{aug.MIXUP:g}, cutmix {aug.CUTMIX:g}"
    )


def _accuracy(path: Path) -> str:
    """The evaluation of this file by ``eval.json`` beside it, else what its training logged when it was saved."""
    report_file, sha256, content = path.parent / "eval.json", _sha256(path), checkpoint.load_file(path)
    kind = "eval_ema" if predicts_by_average(content) else "eval"
    try:
        report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
        if report.get("sha256") == sha256:
            result = report[kind]
            return (f"top-1 {result['acc1']:.2f} %, top-5 {result['acc5']:.2f} % of {result['images']} images, "
                    f"measured on the checkpoint with SHA-256 `{sha256}`")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{report_file} is not an evaluation's report ({error!r:.80}); move it away") from error
    for _, record in parse_metrics(path.parent / "metrics.jsonl"):
        if record and (record["kind"], record["step"]) == (kind, content.get("step")) and record["acc1"] is not None:
            return (f"top-1 {record['acc1']:.2f} % of the validation images, logged by the training after "
                    f"{record['epoch'] + 1} epochs")
    return "not evaluated; run `python main.py --eval` on the checkpoint, then export again"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
