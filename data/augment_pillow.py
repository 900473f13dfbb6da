"""Applies the augmentation of one image in a data worker, with timm's operations on PIL images."""

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from timm.data import auto_augment

from .augment import FILL, Draw, Step


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
        if step.operation != "None":
            sampling = Resampling.BICUBIC if step.bicubic else Resampling.BILINEAR
            image = _OPERATIONS[step.operation](image, step.value, fillcolor=FILL, resample=sampling)
    return image


def _posterize(image: Image.Image, bits: float, **settings) -> Image.Image:
    """timm's, with a black image for 0 bits, as before Pillow 13, which raises an error."""
    return auto_augment.posterize(image, int(bits)) if bits > 0 else Image.new(image.mode, image.size)


_OPERATIONS = {
    "AutoContrast": lambda image, value, **settings: auto_augment.auto_contrast(image),
    "Equalize": lambda image, value, **settings: auto_augment.equalize(image),
    "Invert": lambda image, value, **settings: auto_augment.invert(image),
    "Rotate": auto_augment.rotate,
    "Posterize": _posterize,
    "Solarize": auto_augment.solarize,
    "SolarizeAdd": lambda image, value, **settings: auto_augment.solarize_add(image, int(value)),
    "Color": auto_augment.color,
    "Contrast": auto_augment.contrast,
    "Brightness": auto_augment.brightness,
    "Sharpness": auto_augment.sharpness,
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateX": auto_augment.translate_x_abs,
    "TranslateY": auto_augment.translate_y_abs,
    "GaussianBlur": auto_augment.gaussian_blur,
}
