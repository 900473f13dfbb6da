"""The augmentation of one training image: crop, flip, timm's policy, colour jitter, erased rectangles.

The random choices come from one generator, which depends only on seed, epoch and index: it does not matter which
process prepares an image, on which device, or which images came before it. ``augment`` applies them to an image in a
data worker, ``augment_batch.augment`` to a whole batch on the device.
"""

import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment

from utils import InputError

FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)  # for pixels outside the image
ERASED_AREA = (0.02, 1 / 3)  # share of the image that random erasing covers, over all rectangles; as in timm
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width of a rectangle; as in timm
_TRIES = 10  # for a crop or a rectangle that fits; as in timm
_WITHOUT_VALUE = ("AutoContrast", "Equalize", "Invert")


class Rectangle(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Step(NamedTuple):
    """One operation on one image. timm has several names for some, which differ in how a magnitude becomes a value."""

    operation: str
    value: float = 0.0  # degrees, pixels, a factor or a threshold, depending on the operation
    bicubic: bool = True  # how geometric operations sample; False: bilinear


class Draw(NamedTuple):
    """The augmentation of one image, in the order in which it is applied."""

    crop: Rectangle  # resized to the input size
    bicubic: bool  # how; False: bilinear
    flip: bool
    chains: list[tuple[float, list[Step]]]  # AugMix: weights and steps of the images that are mixed; others: empty
    steps: list[Step]
    erased: list[tuple[Rectangle, int]]  # rectangles, each with the seed of its noise


class Augmentation:
    """The augmentation of a config's training images.

    Attributes:
        size: side of the input, in pixels.
        erase_mode: what erased rectangles are filled with: ``"pixel"`` (noise), ``"rand"`` (one random colour) or
            ``"const"`` (the mean colour).

    Raises:
        InputError: timm does not have the policy.
    """

    def __init__(self, config):
        self.aug, self.size, self.seed = config.AUG, config.DATA.IMG_SIZE, config.SEED
        self.interpolation, self.erase_mode = config.DATA.INTERPOLATION, config.AUG.REMODE
        name = "" if self.aug.AUTO_AUGMENT == "none" else self.aug.AUTO_AUGMENT
        self.policy = _parse(name, self.size, self.interpolation) if name else None
        self.jitter = self.aug.COLOR_JITTER if not name or "3a" in name else 0.0  # as timm combines them

    def draw(self, epoch: int, index: int, width: int, height: int) -> Draw:
        """The choices for one image of a size in pixels."""
        rng = image_generator(self.seed, epoch, index)
        crop = draw_crop(rng, width, height, self.aug.SCALE, self.aug.RATIO)
        bicubic = rng.random() < 0.5 if self.interpolation == "random" else self.interpolation == "bicubic"
        flip, chains, steps = rng.random() < self.aug.HFLIP, [], []
        if isinstance(self.policy, auto_augment.RandAugment):
            steps = [self._step(op, rng) for op in _choose(self.policy, rng)]
        elif isinstance(self.policy, auto_augment.AutoAugment):
            steps = [self._step(op, rng) for op in rng.choice(self.policy.policy)]
        elif isinstance(self.policy, auto_augment.AugMixAugment):
            alpha, depth = self.policy.alpha, self.policy.depth
            weights = [rng.gammavariate(alpha, 1) for _ in range(self.policy.width)]  # normalised: Dirichlet's
            mixed = rng.betavariate(alpha, alpha)
            chains = [(1 - mixed, [])]
            for weight in weights:
                count = depth if depth > 0 else rng.randint(1, 3)
                drawn = [self._step(rng.choice(self.policy.ops), rng) for _ in range(count)]
                chains.append((mixed * weight / sum(weights), drawn))
        if self.jitter:
            jitter = [Step(name, rng.uniform(max(0.0, 1 - self.jitter), 1 + self.jitter))
                      for name in ("Brightness", "Contrast", "Color")]
            rng.shuffle(jitter)
            steps += jitter
        erased = draw_erasing(rng, self.size, self.aug.REPROB, self.aug.RECOUNT)
        return Draw(crop, bicubic, flip, chains, steps, erased)

    def _step(self, op: auto_augment.AugmentOp, rng: random.Random) -> Step:
        """One of timm's operations as timm's ``AugmentOp`` draws it."""
        if op.prob < 1 and rng.random() >= op.prob:
            return Step("None")
        magnitude = op.magnitude
        if op.magnitude_std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif op.magnitude_std > 0:
            magnitude = rng.gauss(magnitude, op.magnitude_std)
        level = max(0.0, min(magnitude, op.magnitude_max or 10.0))
        sampling = op.kwargs["resample"]
        sampling = rng.choice(sampling) if isinstance(sampling, (list, tuple)) else sampling
        return Step(*self._value(op, level, rng), sampling == Resampling.BICUBIC)

    def _value(self, op: auto_augment.AugmentOp, level: float, rng: random.Random) -> tuple[str, float]:
        """The operation behind one of timm's names, and its value at a level from 0 (weak) to 10 (strong).

        timm computes the values into which no random number goes; its others would come from the global generator.
        """
        name, strength, sign = op.name, level / 10, -1.0 if rng.random() < 0.5 else 1.0
        match name:
            case "Rotate":
                return name, sign * 30 * strength
            case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
                return name.removesuffix("Increasing"), max(0.1, 1 + sign * 0.9 * strength)
            case "ShearX" | "ShearY":
                return name, sign * 0.3 * strength
            case "TranslateX" | "TranslateY":
                return name, sign * op.hparams["translate_const"] * strength
            case "TranslateXRel" | "TranslateYRel":
                return name.removesuffix("Rel"), sign * op.hparams.get("translate_pct", 0.45) * strength * self.size
            case "Desaturate":
                return "Color", 1 - min(1.0, 0.5 + 0.5 * strength)
            case "GaussianBlurRand":
                return "GaussianBlur", rng.uniform(0.1, 2.0 * min(1.0, strength))
        value = op.level_fn(level, op.hparams)[0] if op.level_fn else 0.0
        return name.removesuffix("Increasing").removesuffix("Original"), value


def _parse(name: str, size: int, interpolation: str):
    """timm's object for a policy string, with the settings of its ``create_transform``."""
    settings = {"translate_const": int(0.45 * size), "img_mean": FILL}
    if interpolation != "random":
        settings["interpolation"] = Resampling[interpolation.upper()]
    try:
        if name.startswith("rand"):
            return auto_augment.rand_augment_transform(name, settings)
        if name.startswith("augmix"):
            return auto_augment.augment_and_mix_transform(name, settings | {"translate_pct": 0.3})
        return auto_augment.auto_augment_transform(name, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"AUG.AUTO_AUGMENT is {name!r}, which timm does not accept ({error}); "
            "use a policy such as rand-m9-mstd0.5-inc1, or none"
        ) from error


def _choose(policy: auto_augment.RandAugment, rng: random.Random) -> list:
    """RandAugment's operations for one image, drawn with replacement, or without if they have weights."""
    if policy.choice_weights is None:
        return rng.choices(policy.ops, k=policy.num_layers)
    ops, weights, chosen = list(policy.ops), list(policy.choice_weights), []
    for _ in range(policy.num_layers):
        index = rng.choices(range(len(ops)), weights)[0]
        weights.pop(index)
        chosen.append(ops.pop(index))
    return chosen


def image_generator(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one image. Seeding takes microseconds and touches no global state."""
    return random.Random((seed << 80) | (epoch << 48) | index)  # one number for each triple: epoch < 2^32, index < 2^48


def draw_crop(rng: random.Random, width: int, height: int, scale, ratio) -> Rectangle:
    """A random crop of an image, as timm's RandomResizedCrop draws it; if none of ten fits, the largest centred one.

    Args:
        rng: the image's generator.
        width, height: of the image, in pixels.
        scale: smallest and largest area, as a share of the image.
        ratio: smallest and largest width over height.
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
    """The rectangles that random erasing fills in an image of ``size`` pixels, and a seed for the noise of each.

    At most ``most``, which together have the area of one.
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


def augment(image: Image.Image, draw: Draw) -> Image.Image:
    """The RGB image after the flip and the steps of its draw, with timm's operations."""
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.chains:
        total = sum(np.float32(weight) * np.asarray(_run(image, steps), np.float32) for weight, steps in draw.chains)
        image = Image.fromarray((total + 0.5).clip(0, 255).astype(np.uint8))
    return _run(image, draw.steps)


def _run(image: Image.Image, steps: list[Step]) -> Image.Image:
    for step in steps:
        if step.operation == "Posterize" and step.value < 1:  # Pillow 13 raises an error
            image = Image.new(image.mode, image.size)
        elif step.operation != "None":
            value = int(step.value) if step.operation in ("Posterize", "SolarizeAdd") else step.value
            values = () if step.operation in _WITHOUT_VALUE else (value,)
            sampling = Resampling.BICUBIC if step.bicubic else Resampling.BILINEAR
            image = auto_augment.NAME_TO_OP[step.operation](image, *values, fillcolor=FILL, resample=sampling)
    return image
