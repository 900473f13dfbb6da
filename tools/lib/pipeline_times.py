"""Speed of the input pipeline, and how long a training step waits for it: part ``pipeline`` of benchmark.py."""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import load_config
from data import build_train_loader
from tools.lib.network_times import Case, build_step, seconds_of


def measure_pipeline(args, device: torch.device) -> dict:
    """Images per second and worker of the ImageNet recipe's augmentation, and the share of a step spent waiting."""
    name = args.models[0]
    workers = min(os.cpu_count(), 16)
    ahead = 2 * workers  # batches that the workers prepare ahead
    with tempfile.TemporaryDirectory() as folder:
        _write_jpegs(Path(folder), count=max(64, 3 * ahead * args.batch_size))
        config = load_config("", [
            "DATA.DATASET", "imagefolder", "DATA.DATA_PATH", folder, "MODEL.NUM_CLASSES", "2", "MODEL.NAME", name,
            "DATA.IMG_SIZE", str(args.img_size), "DATA.BATCH_SIZE", str(args.batch_size), "DATA.NUM_WORKERS", "0",
        ])
        loader = build_train_loader(config)
        batches = iter(loader)
        next(batches)
        per_worker = args.batch_size / statistics.median(seconds_of(lambda: next(batches)) for _ in range(3))
        config = config.clone()
        config.defrost()
        config.DATA.NUM_WORKERS = workers
        _, step = build_step(Case(name, "ours", "training", args.dtypes[0], False, args.batch_size), args.img_size,
                             device)
        step()
        prepared = iter(build_train_loader(config))
        for i in range(2 * ahead):  # the third part keeps the workers busy until the end
            if i == ahead:  # the batches prepared before the first step are used up
                start, waited = time.perf_counter(), 0.0
            before = time.perf_counter()
            next(prepared)
            if i >= ahead:
                waited += time.perf_counter() - before
            step()
            _synchronize(device)
        total = time.perf_counter() - start
        del prepared  # ends the workers before their images are deleted
    return {"images_per_second_and_worker": per_worker, "workers": workers, "model": name,
            "share_of_step_waiting": waited / total, "images_per_second": ahead * args.batch_size / total}


def _write_jpegs(folder: Path, count: int) -> None:
    """Images of ImageNet's usual size: 500x375 pixels, about 100 KB, smooth with some noise; 64 different ones."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= 64:
            os.link(folder / "train" / str(i % 2) / f"{i % 64}.jpg", path)
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-20, 21, (375, 500, 3), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
