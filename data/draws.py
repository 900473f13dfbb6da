"""The random choices for one training image: its crop, its augmentation steps, its erased rectangles.

All are drawn from one generator, which depends only on seed, epoch and index. It does not matter which process prepares
an image, on which device, or which images came before it.
"""

import math
import random
from typing import NamedTuple

ERASED_AREA = (0.02, 1 / 3)  # share of the image that random erasing covers, over all rectangles; as in timm
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width of a rectangle; as in timm
_TRIES = 10  # for a crop or a rectangle that fits; as in timm


class Rectangle(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def image_generator(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one image. Seeding takes microseconds and touches no global state."""
    return random.Random((seed << 80) | (epoch << 48) | index)  # one number for each triple: epoch < 2^32, index < 2^48


def draw_crop(rng: random.Random, width: int, height: int, scale, ratio) -> Rectangle:
    """A random crop as timm's RandomResizedCrop draws it.

    Args:
        rng: the image's generator.
        width, height: of the image, in pixels.
        scale: smallest and largest area, as a share of the image.
        ratio: smallest and largest width over height.

    Returns:
        The crop; if none of ten fits, the largest centred one of an allowed ratio.
    """
    for _ in range(_TRIES):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Rectangle(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    w, h = max(w, 1), max(h, 1)
    return Rectangle((height - h) // 2, (width - w) // 2, h, w)


def draw_erasing(rng: random.Random, size: int, probability: float, most: int) -> list[tuple[Rectangle, int]]:
    """The rectangles that random erasing fills in a ``size`` x ``size`` image, and a seed for the noise of each.

    Args:
        rng: the image's generator.
        size: side of the image, in pixels.
        probability: that anything is erased.
        most: largest number of rectangles; together they have the area of one.
    """
    if rng.random() >= probability:
        return []
    count = rng.randint(1, most)
    erased = []
    for _ in range(count):
        for _ in range(_TRIES):
            area = rng.uniform(*ERASED_AREA) * size * size / count
            aspect = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < size and 0 < w < size:
                place = Rectangle(rng.randint(0, size - h), rng.randint(0, size - w), h, w)
                erased.append((place, rng.getrandbits(63)))
                break
    return erased
