"""Images per second and core of this repository's data pipeline, timm's loader and torchvision's v2 transforms.

    python tools/bench/data_loading.py                                # synthetic images, 500x375
    python tools/bench/data_loading.py --data-path DIR --images 512   # your own images

All pipelines read the same files with the same recipe (random crop to 224, flip, RandAugment rand-m9-mstd0.5-inc1,
erasing), in turn, in one process and one thread. Measured is the work of a data worker: read, decode, crop, augment,
and collate a batch, of bytes for ours and timm's and of floats for torchvision's. Reported is the CPU time of the
fastest turn, which other programs disturb least.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import InputError, one_line_errors

PARSER = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
PARSER.add_argument("--data-path", type=Path, metavar="DIR",
                    help="a data set in class folders; default: synthetic images")
PARSER.add_argument("--images", type=int, default=128, metavar="N", help="images per turn; default: 128")
PARSER.add_argument("--turns", type=int, default=5, metavar="N", help="default: 5")
PARSER.add_argument("--short-side", type=int, default=288, metavar="N",
                    help="also measure images shrunk once to a shorter side of N; 0: off; default: 288")

if __name__ == "__main__":
    PARSER.parse_args()  # before the slow imports, so that --help is fast

import random
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from config import load_config
from data.augment import Augmentation
from data.datasets import open_images
from data.transforms import Batch, TrainSet
from tools.convert_dataset import convert

BATCH = 32


def write_pictures(root: Path, count: int, width: int = 500, height: int = 375) -> None:
    """Synthetic JPEG images of ImageNet's usual size, smooth with some noise, in two classes of two splits."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
        pixels = np.asarray(coarse, np.int16) + rng.integers(-20, 21, (height, width, 3), dtype=np.int16)
        path = root / ("train" if i > 1 else "val") / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def pipelines_of(root: Path) -> dict:
    """Each pipeline by name: a function from a turn and a list of indices to a collated batch."""
    config = load_config(opts=["DATA.DATASET", "imagefolder", "DATA.DATA_PATH", str(root)])
    images, augmentation = open_images(root, "train"), Augmentation(config)
    worker, device = (TrainSet(images, augmentation, on_device=on_device) for on_device in (False, True))
    # timm's posterize of no bits, which RandAugment draws, fails with Pillow 13.
    operations, posterize = auto_augment.NAME_TO_OP, auto_augment.posterize
    operations["PosterizeIncreasing"] = lambda image, bits, **_: posterize(image, max(bits, 1))
    timm = ImageFolder(str(root / "train"), create_transform(
        224, is_training=True, auto_augment=config.AUG.AUTO_AUGMENT, interpolation="bicubic", color_jitter=None,
        re_prob=0, use_prefetcher=True,
    ))
    torchvision = ImageFolder(str(root / "train"), v2.Compose([
        v2.PILToTensor(), v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(), v2.RandAugment(2, 9), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), v2.RandomErasing(0.25),
    ]))
    return {
        "ours, augmented in the worker": lambda turn, part: [Batch.of([worker[turn, i] for i in part]).images],
        "ours, augmented on the device": lambda turn, part: [Batch.of([device[turn, i] for i in part]).images],
        "timm's loader": lambda turn, part: fast_collate([timm[i] for i in part]),
        "torchvision v2": lambda turn, part: default_collate([torchvision[i] for i in part]),
    }


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Measures and prints Markdown."""
    args = PARSER.parse_args(argv)
    if min(args.images, args.turns) < 1:
        raise InputError("--images and --turns must be at least 1")
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_path or Path(folder, "made")
        if not args.data_path:
            write_pictures(root, args.images + 2)
        pipelines = pipelines_of(root)
        count = min(args.images, len(open_images(root, "train")))
        if args.short_side:
            convert(root, Path(folder, "small"), "folders", args.short_side)
            small = pipelines_of(Path(folder, "small"))
            pipelines |= {f"{name}, {args.short_side} pixels": small[name] for name in list(small)[:2]}
        seconds = dict.fromkeys(pipelines, float("inf"))  # CPU time per image, of the fastest turn
        for turn in range(args.turns):
            for name, make in pipelines.items():
                start = time.process_time()
                for begin in range(0, count, BATCH):
                    make(turn, range(begin, min(begin + BATCH, count)))
                seconds[name] = min(seconds[name], (time.process_time() - start) / count)
    print(f"{count} images, {args.turns} turns; PyTorch {torch.__version__}, one thread\n")
    print("| pipeline | images/s per core | ms per image | speed relative to timm |\n|---|---|---|---|")
    for name, time_taken in seconds.items():
        ratio = seconds["timm's loader"] / time_taken
        print(f"| {name} | {1 / time_taken:.0f} | {1e3 * time_taken:.2f} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
