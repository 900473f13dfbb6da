"""Images per second and core of this repository's data pipeline, timm's loader and torchvision's v2 transforms.

    python tools/benchmark_data.py                                # synthetic images, 500x375
    python tools/benchmark_data.py --data-path DIR --images 512   # your own images

All pipelines read the same files with the same recipe (random crop to 224, flip, RandAugment rand-m9-mstd0.5-inc1,
erasing), in turn, in one process and one thread. Measured is the work of a data worker: read, decode, crop, augment,
and collate a batch, of bytes for ours and timm's and of floats for torchvision's. Reported is the CPU time of the
fastest turn, which other programs disturb least; the device's part is measured separately.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).parents[1]))

from config import load_config
from data import DeviceBatches, device_ops
from data.datasets import open_images
from data.transforms import TrainDraws, TrainSet
from tools.convert_dataset import convert
from tools.lib.traffic import count_call
from utils import one_line_errors

BATCH = 32
POLICY = "rand-m9-mstd0.5-inc1"


def write_pictures(root: Path, count: int, width: int = 500, height: int = 375) -> None:
    """Synthetic JPEG images of ImageNet's usual size, smooth with some noise, in two classes of two splits."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
        pixels = np.asarray(coarse, np.int16) + rng.integers(-20, 21, (height, width, 3), dtype=np.int16)
        path = root / ("train" if i else "val") / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    (root / "val" / "1").mkdir()
    (root / "val" / "1" / "1.jpg").write_bytes((root / "val" / "0" / "0.jpg").read_bytes())


def run_config(root: Path, augment_on: str):
    """The paper's recipe on a folder of images."""
    return load_config(opts=["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", str(root), "DATA.NUM_WORKERS", "0",
                             "DATA.AUGMENT_ON", augment_on])  # fmt: skip


def loaders(root: Path) -> dict:
    """Each pipeline by name: a function from a turn and a list of indices to a collated batch."""
    images, draws = open_images(root, "train"), TrainDraws(run_config(root, "worker"))
    ours = {name: TrainSet(images, draws, on_device) for name, on_device in (("worker", False), ("device", True))}
    # timm's posterize of no bits, which RandAugment draws, fails with Pillow 13.
    operations, posterize = auto_augment.NAME_TO_OP, auto_augment.posterize
    operations["PosterizeIncreasing"] = lambda image, bits, **_: posterize(image, max(bits, 1))
    timm = ImageFolder(str(root / "train"), create_transform(
        224, is_training=True, auto_augment=POLICY, interpolation="bicubic", color_jitter=None, re_prob=0,
        use_prefetcher=True,
    ))  # fmt: skip
    torchvision = ImageFolder(str(root / "train"), v2.Compose([
        v2.PILToTensor(), v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(), v2.RandAugment(2, 9), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), v2.RandomErasing(0.25),
    ]))  # fmt: skip
    return {
        "ours, augmented in the worker": lambda turn, part: default_collate([ours["worker"][turn, i] for i in part]),
        "ours, augmented on the device": lambda turn, part: default_collate([ours["device"][turn, i] for i in part]),
        "timm's loader": lambda turn, part: fast_collate([timm[i] for i in part]),
        "torchvision v2": lambda turn, part: default_collate([torchvision[i] for i in part]),
    }


def measure(pipelines: dict, count: int, turns: int) -> dict[str, list[float]]:
    """CPU seconds per image of each pipeline, for each turn."""
    seconds = {name: [] for name in pipelines}
    parts = [range(begin, min(begin + BATCH, count)) for begin in range(0, count, BATCH)]
    for turn in range(turns):
        for name, make in pipelines.items():
            start = time.process_time()
            for part in parts:
                make(turn, part)
            seconds[name].append((time.process_time() - start) / count)
    return seconds


def device_part(root: Path, turns: int) -> list[str]:
    """The device's part: each step's bytes and launches, and its time with this CPU as the device."""
    config = run_config(root, "device")
    draws = TrainDraws(config)
    dataset = TrainSet(open_images(root, "train"), draws, on_device=True)
    batch = default_collate([dataset[epoch, i % len(dataset)] for epoch in range(4) for i in range(BATCH)])
    finish = DeviceBatches(_Empty(), torch.device("cpu"), draws.policy)
    steps = {
        "augment": lambda: device_ops.augment(batch.images.permute(0, 3, 1, 2), draws.policy, batch.steps,
                                              batch.weights),
        "normalise and erase": lambda: finish.finish(batch._replace(steps=batch.steps[:, :0])),
    }  # fmt: skip
    lines = []
    for name, run in steps.items():
        traffic, best = count_call(run), np.inf
        for _ in range(turns):
            start = time.process_time()
            run()
            best = min(best, time.process_time() - start)
        count = len(batch.images)
        lines.append(f"{name}: {traffic.total('bytes') / count / 1e6:.2f} MB per image, {traffic.total('launches')} "
                     f"launches per batch of {count}; {1e3 * best / count:.2f} ms per image on this CPU")  # fmt: skip
    return lines


class _Empty:
    dataset = batch_sampler = None


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, metavar="DIR",
                        help="a data set in class folders; default: synthetic images")
    parser.add_argument("--images", type=int, default=128, metavar="N", help="images per turn; default: 128")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--short-side", type=int, default=288, metavar="N",
                        help="also measure images shrunk once to a shorter side of N; 0: off; default: 288")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or Path(folder, "made")
        if not args.data_path:
            write_pictures(root, args.images + 1)
        pipelines = loaders(root)
        count = min(args.images, len(open_images(root, "train")))
        if args.short_side:
            convert(root, Path(folder, "small"), "folders", args.short_side)
            small = loaders(Path(folder, "small"))
            pipelines |= {f"{name}, {args.short_side} pixels": small[name] for name in list(small)[:2]}
        seconds = measure(pipelines, count, args.turns)
        parts = device_part(root, args.turns)
    timm = min(seconds["timm's loader"])
    print(f"{count} images, {args.turns} turns; PyTorch {torch.__version__}, {torch.get_num_threads()} thread\n")
    print("| pipeline | images/s per core | ms per image | speed relative to timm |\n|---|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {1 / min(times):.0f} | {1e3 * min(times):.2f} | {timm / min(times):.2f} |")
    print("\nOn the device:\n" + "\n".join(f"- {line}" for line in parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
