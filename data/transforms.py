"""The steps of a data worker from an image file to a batch, all in bytes: crop, resize, optionally augment."""

import contextlib
import multiprocessing
import queue
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from . import pillow_ops
from .augment import Policy, encode
from .draws import Rectangle, draw_crop, draw_erasing, image_generator
from .images import ImageError

MOST_PIXELS = 2**27  # of a resized image before its centre is cropped; 0.5 GB in Pillow


class Sample(NamedTuple):
    """One image, or a batch of them with one more dimension, and the steps that remain for the device."""

    images: torch.Tensor  # uint8 (S, S, 3)
    targets: torch.Tensor | int
    steps: torch.Tensor  # float32 (L, 3): the augmentation steps, see augment.encode; L is 0 if they are done
    weights: torch.Tensor  # float32: of AugMix's chains, see augment.Draw
    erased: torch.Tensor  # int64 (R, 5): top, left, height, width and seed of each erased rectangle; height 0: none


class TrainDraws:
    """The random part of training images, by seed, epoch and index.

    Args:
        config: the run's config.
    """

    def __init__(self, config):
        self.aug, self.size, self.seed = config.AUG, config.DATA.IMG_SIZE, config.SEED
        self.interpolation = config.DATA.INTERPOLATION
        self.policy = Policy(config)

    def draw(self, epoch: int, index: int, width: int, height: int):
        """An image's crop, whether to resize it bicubically, its ``augment.Draw`` and its erased rectangles (R, 5)."""
        rng = image_generator(self.seed, epoch, index)
        crop = draw_crop(rng, width, height, self.aug.SCALE, self.aug.RATIO)
        bicubic = rng.random() < 0.5 if self.interpolation == "random" else self.interpolation == "bicubic"
        draw = self.policy.draw(rng)
        erased = np.zeros((self.aug.RECOUNT, 5), np.int64)
        for row, (place, seed) in enumerate(draw_erasing(rng, self.size, self.aug.REPROB, self.aug.RECOUNT)):
            erased[row] = *place, seed
        return crop, bicubic, draw, erased


class TrainSet(Dataset):
    """``(epoch, index)`` to a ``Sample``: a function of seed, epoch and index only.

    It does not matter which worker of which process prepares an image, or which images came before it. A run that is
    resumed in the middle of an epoch sees the images that the uninterrupted run would have seen.

    Args:
        images: ``pixels(index)`` returns uint8 (H, W, 3) and the label, or raises ImageError or OSError.
        draws: of the augmentation.
        on_device: leave the augmentation's steps to the device.
        skip_bad: whether to replace an image that cannot be read with the next one and report it in ``bad_images``,
            instead of raising an error.
    """

    def __init__(self, images, draws: TrainDraws, on_device: bool = False, skip_bad: bool = False):
        self.images, self.draws, self.on_device = images, draws, on_device
        self.classes = images.classes
        self._bad = None
        if skip_bad:
            self._bad = multiprocessing.Queue()  # from the workers to the training process

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        pixels, label = self._read(index)
        height, width = pixels.shape[:2]
        crop, bicubic, draw, erased = self.draws.draw(epoch, index, width, height)
        pixels = resized_crop(pixels, crop, self.draws.size, bicubic)
        steps, weights = draw.steps, draw.weights
        if not self.on_device:
            image = pillow_ops.augment(Image.fromarray(pixels), self.draws.policy, draw)
            pixels, steps, weights = np.array(image), [], []
        arrays = pixels, encode(steps), np.array(weights, np.float32), erased
        pixels, *rest = (torch.from_numpy(array) for array in arrays)
        return Sample(pixels, label, *rest)

    def _read(self, index: int):
        for step in range(len(self)):
            try:
                return self.images.pixels((index + step) % len(self))
            except (ImageError, OSError) as error:
                if self._bad is None:
                    raise
                self._bad.cancel_join_thread()  # a worker can end before its messages are read
                self._bad.put(str(error))
        raise ImageError("no image of the training set can be read")

    def bad_images(self) -> list[str]:
        """The errors of the images replaced since the last call, each a message that names the file."""
        messages = []
        with contextlib.suppress(queue.Empty):
            while self._bad is not None:
                messages.append(self._bad.get_nowait())
        return messages


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


class EvalSet(Dataset):
    """``index`` to a ``Sample``, prepared like ``build_transform`` but not normalised."""

    def __init__(self, images, config):
        self.images, self.fit = images, _fit(config)
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.images[index]
        none = torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 5, dtype=torch.int64)
        try:
            pixels = np.array(self.fit(image))
        except ImageError as error:
            raise ImageError(f"{self.images.name(index)}: {error}") from None
        return Sample(torch.from_numpy(pixels), label, *none)


def build_transform(config):
    """The preprocessing of evaluation, with Pillow: an RGB PIL image to a normalised float32 (3, IMG_SIZE, IMG_SIZE).

    Resizes the shorter side to 256/224 of the input size and crops the centre, or, with ``TEST.CROP`` off, resizes the
    whole image to the input size.

    The transform raises ImageError for an image so narrow that it would be enormous after resizing.
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
            raise ImageError(
                f"an image of {width}x{height} pixels would have {pixels:.2g} once resized to a shorter side of "
                f"{self.size}; the limit is {MOST_PIXELS:.2g}. Crop or remove it, or set TEST.CROP False"
            )
        return super().forward(image)
