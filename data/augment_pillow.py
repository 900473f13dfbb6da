"""Applies the augmentation of one image in a data worker, with timm's operations on PIL images."""

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from timm.data import auto_augment

from .augment import FILL, Draw, Step

_WITHOUT_VALUE = ("AutoContrast", "Equalize", "Invert")
_WHOLE = ("Posterize", "SolarizeAdd")


def augment(image: Image.Image, draw: Draw, blended: bool) -> Image.Image:
    """The RGB image after the flip and the steps of its draw; ``blended`` is ``Augmentation.blended``."""
    if draw.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.chains:  # AugMix
        *weights, mixture = draw.weights
        chains = list(zip(weights, [run(image, chain) for chain in draw.chains], strict=True))
        if blended:
            for weight, chain in chains:
                image = Image.blend(image, chain, weight)
        else:
            total = sum(np.float32(weight) * np.asarray(chain, np.float32) for weight, chain in chains)
            image = Image.blend(image, Image.fromarray(total.clip(0, 255).astype(np.uint8)), mixture)
    return run(image, draw.steps)


def run(image: Image.Image, steps: list[Step]) -> Image.Image:
    """The image after all steps in turn."""
    for step in steps:
        if step.operation == "Posterize" and step.value < 1:  # Pillow 13 raises an error
            image = Image.new(image.mode, image.size)
        elif step.operation != "None":
            value = int(step.value) if step.operation in _WHOLE else step.value
            values = () if step.operation in _WITHOUT_VALUE else (value,)
            sampling = Resampling.BICUBIC if step.bicubic else Resampling.BILINEAR
            image = auto_augment.NAME_TO_OP[step.operation](image, *values, fillcolor=FILL, resample=sampling)
    return image
