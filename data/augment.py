"""timm's augmentation policies as lists of steps: parsed by timm, drawn here, applied by Pillow or on the device.

A draw of a policy holds the operations for one image and their strengths. ``pillow_ops.augment`` applies them in a data
worker, ``device_ops.augment`` to a whole batch on the device.
"""

import math
import random
from typing import NamedTuple

import numpy as np
from PIL.Image import Resampling
from timm.data import IMAGENET_DEFAULT_MEAN, auto_augment

from utils import InputError

FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)  # for pixels outside the image

# The operations, by their number in arrays of steps. Names of timm that differ only in how a magnitude becomes a value
# (Posterize, PosterizeIncreasing, ...) are the same operation here.
OPERATIONS = (
    "None", "Flip", "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "GaussianBlur",
)  # fmt: skip


class Step(NamedTuple):
    """One operation on one image."""

    operation: str
    value: float = 0.0  # degrees, pixels, a factor or a threshold, depending on the operation
    bicubic: bool = True  # how geometric operations sample; False: bilinear


NOTHING = Step("None")


class Draw(NamedTuple):
    """The augmentation of one image.

    ``steps`` are the chains of steps, one after the other; shorter chains are padded. ``weights`` is empty if there is
    only one chain. AugMix has several, each applied separately to the flipped image: ``weights`` then holds the weight
    of each chain and, last, that of their mixture against the image.
    """

    steps: list[Step]
    weights: list[float] = []


class Policy:
    """The flip, the policy of ``AUG.AUTO_AUGMENT`` and the colour jitter of a config.

    Attributes:
        length: number of steps in a draw, the same for every image; the first is the flip.
        chains: the steps of each of AugMix's chains; empty for other policies.
        blended: AugMix blends its chains into the image one after the other.
        first_common: the first step after the flip and AugMix's chains.

    Raises:
        InputError: timm does not have the policy.
    """

    def __init__(self, config):
        aug, self.size = config.AUG, config.DATA.IMG_SIZE
        self.flip = aug.HFLIP
        name = "" if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT
        self.timm = _parse(name, self.size, config.DATA.INTERPOLATION) if name else None
        self.jitter = aug.COLOR_JITTER if not name or "3a" in name else 0.0  # as timm combines them
        self.chains, self.blended, self.first_common, depth = [], False, 1, 0
        if isinstance(self.timm, auto_augment.RandAugment):
            depth = self.timm.num_layers
        elif isinstance(self.timm, auto_augment.AutoAugment):
            depth = max(len(steps) for steps in self.timm.policy)
        elif isinstance(self.timm, auto_augment.AugMixAugment):
            deepest = self.timm.depth if self.timm.depth > 0 else 3
            self.chains = [slice(1 + deepest * i, 1 + deepest * (i + 1)) for i in range(self.timm.width)]
            self.blended, self.first_common = self.timm.blended, self.chains[-1].stop
        self.length = self.first_common + depth + 3 * (self.jitter > 0)

    def draw(self, rng: random.Random) -> Draw:
        """The steps of one image; ``rng`` is its generator."""
        steps, weights = [Step("Flip") if rng.random() < self.flip else NOTHING], []
        policy = self.timm
        if isinstance(policy, auto_augment.RandAugment):
            steps += [self._step(op, rng) for op in _choose(policy, rng)]
        elif isinstance(policy, auto_augment.AutoAugment):
            steps += [self._step(op, rng) for op in rng.choice(policy.policy)]
        elif isinstance(policy, auto_augment.AugMixAugment):
            weights = _augmix_weights(policy, rng)
            for chain in self.chains:
                depth = policy.depth if policy.depth > 0 else rng.randint(1, 3)
                steps += [self._step(rng.choice(policy.ops), rng) for _ in range(depth)]
                steps += [NOTHING] * (chain.stop - len(steps))
        if self.jitter:
            jitter = [Step(name, rng.uniform(max(0.0, 1 - self.jitter), 1 + self.jitter))
                      for name in ("Brightness", "Contrast", "Color")]  # fmt: skip
            rng.shuffle(jitter)
            steps += jitter
        return Draw(steps + [NOTHING] * (self.length - len(steps)), weights)

    def _step(self, op: auto_augment.AugmentOp, rng: random.Random) -> Step:
        """One of timm's operations as timm's ``AugmentOp`` draws it."""
        if op.prob < 1 and rng.random() >= op.prob:
            return NOTHING
        magnitude = op.magnitude
        if op.magnitude_std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif op.magnitude_std > 0:
            magnitude = rng.gauss(magnitude, op.magnitude_std)
        level = max(0.0, min(magnitude, op.magnitude_max or 10.0)) / 10
        sampling = op.kwargs["resample"]
        sampling = rng.choice(sampling) if isinstance(sampling, (list, tuple)) else sampling
        return Step(*self._value(op.name, level, op.hparams, rng), sampling == Resampling.BICUBIC)

    def _value(self, name: str, level: float, hparams: dict, rng: random.Random) -> tuple[str, float]:
        """The operation behind one of timm's names, and its value at a level from 0 (weak) to 1 (strong)."""
        sign = -1.0 if rng.random() < 0.5 else 1.0
        match name:
            case "AutoContrast" | "Equalize" | "Invert":
                return name, 0.0
            case "Rotate":
                return name, sign * 30 * level
            case "Posterize":
                return name, int(4 * level)
            case "PosterizeIncreasing":
                return "Posterize", 4 - int(4 * level)
            case "PosterizeOriginal":
                return "Posterize", 4 + int(4 * level)
            case "Solarize":
                return name, min(256, int(256 * level))
            case "SolarizeIncreasing":
                return "Solarize", 256 - min(256, int(256 * level))
            case "SolarizeAdd":
                return name, min(128, int(110 * level))
            case "Color" | "Contrast" | "Brightness" | "Sharpness":
                return name, 1.8 * level + 0.1
            case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
                return name.removesuffix("Increasing"), max(0.1, 1 + sign * 0.9 * level)
            case "ShearX" | "ShearY":
                return name, sign * 0.3 * level
            case "TranslateX" | "TranslateY":
                return name, sign * hparams["translate_const"] * level
            case "TranslateXRel" | "TranslateYRel":
                return name.removesuffix("Rel"), sign * hparams.get("translate_pct", 0.45) * level * self.size
            case "Desaturate":
                return "Color", 1 - min(1.0, 0.5 + 0.5 * level)
            case "GaussianBlur":
                return name, min(2.0, 0.1 + 1.9 * level)
            case "GaussianBlurRand":
                return "GaussianBlur", rng.uniform(0.1, 2.0 * min(1.0, level))
        raise ValueError(f"timm's operation {name} is not supported here")


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


def _augmix_weights(policy: auto_augment.AugMixAugment, rng: random.Random) -> list[float]:
    """Dirichlet weights of the chains and, last, the Beta weight of their mixture."""
    drawn = [rng.gammavariate(policy.alpha, 1) for _ in range(policy.width)]
    mixture = rng.betavariate(policy.alpha, policy.alpha)
    weights = [weight / sum(drawn) for weight in drawn]
    return (successive_weights(weights, mixture) if policy.blended else weights) + [mixture]


def successive_weights(weights: list[float], mixture: float) -> list[float]:
    """AugMix's blended form: the factors with which blending the chains in turn gives each its share of the result."""
    left, found = 1.0, []
    for weight in reversed([weight * mixture for weight in weights]):
        share = weight / left
        left *= 1 - share
        found.append(share)
    return found[::-1]


def encode(steps: list[Step]) -> np.ndarray:
    """Steps as float32 (len(steps), 3): the number of the operation, its value, 1 for bicubic sampling."""
    rows = [(_NUMBERS[step.operation], step.value, step.bicubic) for step in steps]
    return np.array(rows, np.float32).reshape(-1, 3)


_NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}
