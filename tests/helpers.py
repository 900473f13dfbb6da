"""What several tests share: a training that takes a second, its data, networks and checkpoints, and comparisons."""

import contextlib
import functools
import tempfile
from pathlib import Path

import torch
from PIL import Image

import checkpoint
from config import load_config, to_dict
from data.datasets import read_digits
from models import build_model
from tests.processes import ROOT, Fork, wait_for

FAULTS = ROOT / "tests" / "runs" / "faults.py"
DIGITS = ROOT / "configs" / "smlp_nano_alpha3_patch2_32_digits.yaml"

# A small network and two epochs, with everything on that draws random numbers or carries state.
TINY = [
    "DATA.IMG_SIZE", "16", "DATA.BATCH_SIZE", "40", "DATA.NUM_WORKERS", "0", "MODEL.STRIP_MLP.EMBED_DIM", "8",
    "MODEL.STRIP_MLP.DEPTHS", "[1, 1, 1, 1]", "MODEL.DROP_PATH_RATE", "0.1", "TRAIN.EPOCHS", "2",
    "TRAIN.WARMUP_EPOCHS", "1", "TRAIN.EMA.ENABLED", "True", "TRAIN.EMA.DECAY", "0.9", "AUG.MIXUP", "0.8",
    "AUG.CUTMIX", "1.0", "PRINT_FREQ", "3",
]
IMAGES = {"train": 287, "val": 40}  # of such a training: 7 micro-batches of 40 images an epoch, and 7 images over
_FEW_DIGITS = tempfile.TemporaryDirectory(prefix="few_digits_")


def arguments(output, *opts, tag="run", flags=()) -> list[str]:
    """The command line of a tiny training into ``output``."""
    data = ["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", few_digits()]
    return ["--cfg", str(DIGITS), "--output", str(output), "--tag", tag, "--device", "cpu", *flags,
            "--opts", *TINY, *map(str, data), *map(str, opts)]


def folder(output, tag="run") -> Path:
    """Where such a run keeps its results."""
    return Path(output, DIGITS.stem, tag)


@functools.cache
def few_digits() -> Path:
    """The images that a tiny training reads, made once and removed with the process."""
    return digits_folder(Path(_FEW_DIGITS.name), **IMAGES)


def digits_folder(root: Path, train=120, val=61) -> Path:
    """An ImageFolder of so many of the bundled digits, as many of each class as it can be."""
    for split, count in (("train", train), ("val", val)):
        images, labels, classes = read_digits(split)
        by_class = [[i for i, label in enumerate(labels) if label == k] for k in range(len(classes))]
        for name in classes:
            (root / split / name).mkdir(parents=True)
        for n in range(count):
            label, i = n % len(classes), by_class[n % len(classes)][n // len(classes)]
            Image.fromarray(images[i]).save(root / split / classes[label] / f"{i}.png")
    return root


def tiny_network(seed=0):
    """The config of a tiny training and its network, with running statistics that are not the initial ones."""
    config = load_config(DIGITS, TINY)
    torch.manual_seed(seed)
    model = build_model(config)
    model(torch.randn(4, 3, 16, 16))
    return config, model.eval()


def save_network(path, config, model, /, **entries) -> Path:
    """Saves what a checkpoint says of its network: all that is needed to use it."""
    classes = [f"digit {label}" for label in range(config.MODEL.NUM_CLASSES)]
    content = {"model": model.state_dict(), "model_ema": None, "config": to_dict(config), "classes": classes}
    checkpoint.save_file(content | entries, path)
    return path


@contextlib.contextmanager
def another_run(run_folder):
    """Another process that holds the lock of an output folder; yields it."""
    holder = Fork(["-c", "import checkpoint, sys, time; lock = checkpoint.lock_folder(sys.argv[1]); "
                         "print('held', flush=True); time.sleep(60)", run_folder])
    wait_for(lambda: "held" in holder.stdout, holder)
    try:
        yield holder
    finally:
        holder.kill()
        holder.wait()


def differences(a, b, path="") -> list[str]:
    """Where two nested contents differ, tensors compared bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: length {len(a)} and {len(b)}"]
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]
