"""The steps of a data worker from an image file to a batch, all in bytes: crop, resize, optionally augment."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from .augment import Augmentation, Draw, Rectangle, augment
from .images import ImageError, ImageSet, with_advice

NO_LABEL = -100  # of a validation image that could not be read; cross entropy ignores it
MOST_PIXELS = 2**27  # of a resized image before its centre is cropped; 0.5 GB in Pillow


class Sample(NamedTuple):
    """One image for a batch."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    label: int
    draw: Draw | None = None  # the augmentation that remains for the device
    errors: list[str] = []  # of images that could not be read, in whose place it is


@dataclass
class Batch:
    """The samples of a batch."""

    images: torch.Tensor  # uint8 (N, S, S, 3)
    labels: torch.Tensor  # int64 (N)
    draws: list[Draw]  # of each image, or empty
    errors: list[str]

    @classmethod
    def of(cls, samples: list[Sample]) -> "Batch":
        images = torch.utils.data.default_collate([torch.from_numpy(sample.pixels) for sample in samples])
        draws = [sample.draw for sample in samples if sample.draw]
        errors = [error for sample in samples for error in sample.errors]
        return cls(images, torch.tensor([sample.label for sample in samples]), draws, errors)

    def pin_memory(self) -> "Batch":
        """With page-locked tensors, so that copies to a GPU do not wait; PyTorch's loader calls it."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.draws, self.errors)


class TrainSet(Dataset):
    """``(epoch, index)`` to a ``Sample``: a function of seed, epoch and index only.

    Args:
        images: the data set.
        augmentation: of the images.
        on_device: leave the augmentation, but for the crop, to the device.
        skip_bad: replace an image that cannot be read with the next one instead of raising an error.
    """

    def __init__(self, images: ImageSet, augmentation: Augmentation, on_device: bool = False, skip_bad: bool = False):
        self.images, self.augmentation = images, augmentation
        self.on_device, self.skip_bad = on_device, skip_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        pixels, label, errors = self._read(index)
        height, width = pixels.shape[:2]
        draw = self.augmentation.draw(epoch, index, width, height)
        pixels = resized_crop(pixels, draw.crop, self.augmentation.size, draw.bicubic)
        if not self.on_device:
            pixels = np.array(augment(Image.fromarray(pixels), draw))
            draw = draw._replace(flip=False, chains=[], steps=[])
        return Sample(pixels, label, draw, errors)

    def _read(self, index: int):
        errors = []
        for step in range(len(self)):
            try:
                return *self.images.pixels((index + step) % len(self)), errors
            except (ImageError, OSError) as error:
                if not self.skip_bad:
                    raise with_advice(error) from None
                errors.append(str(error))
        raise ImageError(f"no image of the training set can be read; the first error: {errors[0]}")


class EvalSet(Dataset):
    """``index`` to a ``Sample``, prepared like ``build_transform`` but not normalised.

    With ``DATA.SKIP_BAD_IMAGES`` an image that cannot be used is black and has the label ``NO_LABEL``.
    """

    def __init__(self, images: ImageSet, config):
        self.images, self.fit = images, _fit(config)
        self.skip_bad, self.size = config.DATA.SKIP_BAD_IMAGES, config.DATA.IMG_SIZE

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, label = self.images[index]
            try:
                return Sample(np.array(self.fit(image)), label)
            except ImageError as error:
                raise ImageError(f"{self.images.name(index)}: {error}") from None
        except (ImageError, OSError) as error:
            if not self.skip_bad:
                raise with_advice(error) from None
            return Sample(np.zeros((self.size, self.size, 3), np.uint8), NO_LABEL, None, [str(error)])


def resized_crop(pixels: np.ndarray, crop: Rectangle, size: int, bicubic: bool) -> np.ndarray:
    """A crop of an image, uint8 (H, W, 3), resized to uint8 (size, size, 3).

    With PyTorch's kernel for bytes, which takes less than half of Pillow's time and agrees with it on photographs to 1
    level except for one pixel of 1,000: Pillow 13 resizes columns before rows for some shapes, and so rounds
    differently.
    """
    part = pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    part = torch.from_numpy(np.array(part)[None]).permute(0, 3, 1, 2)  # (1, H, W, C) -> (1, C, H, W)
    part = part.contiguous(memory_format=torch.channels_last)  # also if a side of 1 makes the layout ambiguous
    mode = "bicubic" if bicubic else "bilinear"
    planes = F.interpolate(part, (size, size), mode=mode, antialias=True)[0]
    return np.stack(planes.numpy(), axis=-1)  # (C, H, W) -> (H, W, C), three times as fast as with torch


def build_transform(config):
    """The preprocessing of evaluation, with Pillow: an RGB PIL image to a normalised float32 (3, IMG_SIZE, IMG_SIZE).

    Resizes the shorter side to 256/224 of the input size and crops the centre, or, with ``TEST.CROP`` off, resizes the
    whole image to the input size. Raises ImageError for an image so narrow that it would be enormous after resizing.
    """
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*_fit(config).transforms, transforms.ToTensor(), normalize])


def _fit(config) -> transforms.Compose:
    """From an RGB PIL image of any size to one of the input size."""
    size, name = config.DATA.IMG_SIZE, config.DATA.INTERPOLATION
    interpolation = InterpolationMode("bicubic" if name == "random" else name)
    if not config.TEST.CROP:
        return transforms.Compose([transforms.Resize((size, size), interpolation)])
    return transforms.Compose([Resize(eval_size(config), interpolation), transforms.CenterCrop(size)])


def eval_size(config) -> int:
    """The shorter side to which an evaluation resizes before it crops, in pixels."""
    return config.DATA.IMG_SIZE * 256 // 224


class Resize(transforms.Resize):
    """torchvision's ``Resize`` of the shorter side, with a limit: a 1x60000 image would take 17 GB."""

    def forward(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        pixels = self.size**2 * max(width, height) / min(width, height)
        if pixels > MOST_PIXELS:
            raise ImageError(f"an image of {width}x{height} pixels would have {pixels:.2g} once resized to a shorter "
                             f"side of {self.size}. Crop or remove it, or set TEST.CROP False")
        return super().forward(image)
