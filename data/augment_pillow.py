"""Applies the augmentation of one image in a data worker, with timm's operations on PIL images.

Shears and translations have their own code here, in less than half of the time: they only shift each row (or column).
"""

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


def _without_value(operation):
    return lambda image, _, **settings: operation(image)


def _shear_x(image: Image.Image, factor: float, resample, **settings) -> Image.Image:
    return _shift_rows(image, factor * (np.arange(image.height) + 0.5), resample == Resampling.BICUBIC)


def _translate_x(image: Image.Image, pixels: float, resample, **settings) -> Image.Image:
    return _shift_rows(image, np.full(image.height, float(pixels)), resample == Resampling.BICUBIC)


def _transposed(operation):
    def transposed(image: Image.Image, value: float, **settings) -> Image.Image:
        moved = operation(image.transpose(Image.Transpose.TRANSPOSE), value, **settings)
        return moved.transpose(Image.Transpose.TRANSPOSE)

    return transposed


def _shift_rows(image: Image.Image, shift: np.ndarray, bicubic: bool) -> Image.Image:
    """As ``Image.transform`` within 1 level: each row sampled ``shift`` (H) pixels to the right, ``FILL`` outside."""
    width, height = image.size
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.int32).reshape(height, width)
    first = np.floor(shift).astype(int)  # pixel x becomes x + first + fraction
    d = (shift - first).astype(np.float32)[:, None]
    if bicubic:  # Pillow's cubic of Image.transform, a = -1
        weights = (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2)
        taps = range(-1, 3)
    else:
        weights, taps = (1 - d, d), range(2)
    reach = min(int(np.abs(first).max()) + 2, width + 2)  # beyond the border everything is filled
    padded = np.pad(pixels, ((0, 0), (reach, reach)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)  # (H, 2 * reach + 1, W)
    rows, total = np.arange(height), np.full((height, 4 * width), 2**-10, np.float32)  # 76.9999 is 77, not cut to 76
    for weight, tap in zip(weights, taps, strict=True):
        total += weight * windows[rows, (first + tap + reach).clip(0, 2 * reach)].view(np.uint8)
    moved = np.clip(total, 0, 255, out=total).astype(np.uint8).view(np.int32)
    position = np.arange(width) + 0.5 + shift[:, None]
    moved[(position < 0) | (position >= width)] = np.array([*FILL, 0], np.uint8).view(np.int32)[0]
    return Image.frombytes("RGB", image.size, moved.tobytes(), "raw", "RGBX")


_OPERATIONS = {
    "AutoContrast": _without_value(auto_augment.auto_contrast),
    "Equalize": _without_value(auto_augment.equalize),
    "Invert": _without_value(auto_augment.invert),
    "Rotate": auto_augment.rotate,
    "Posterize": _posterize,
    "Solarize": auto_augment.solarize,
    "SolarizeAdd": lambda image, value, **settings: auto_augment.solarize_add(image, int(value)),
    "Color": auto_augment.color,
    "Contrast": auto_augment.contrast,
    "Brightness": auto_augment.brightness,
    "Sharpness": auto_augment.sharpness,
    "ShearX": _shear_x,
    "ShearY": _transposed(_shear_x),
    "TranslateX": _translate_x,
    "TranslateY": _transposed(_translate_x),
    "GaussianBlur": auto_augment.gaussian_blur,
}
