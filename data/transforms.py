"""What happens to an image between its file and its batch, and where the randomness of that comes from.

Importing this module replaces timm's posterize operation, which fails with Pillow 13, in the whole process.
"""

import contextlib
import multiprocessing
import queue
import random

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from .images import ImageError


def _posterize(image: Image.Image, bits_to_keep: int, **hparams) -> Image.Image:
    """timm's, with the black image for 0 bits that Pillow gave before version 13, which makes it an error."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **hparams)


for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    auto_augment.NAME_TO_OP[_name] = _posterize


def build_transform(config, train: bool):
    """From an RGB PIL image of any size to a normalised float32 tensor (3, IMG_SIZE, IMG_SIZE).

    Training: timm's random crop, flip, RandAugment (or colour jitter) and random erasing, as ``AUG`` says.
    Evaluation: the shorter side to 256/224 of the input size and the centre of that, or, with ``TEST.CROP`` off, the
    whole image squeezed to the input size.

    Raises:
        ValueError: timm does not know the policy in ``AUG.AUTO_AUGMENT``.
    """
    return _train_transform(config) if train else _eval_transform(config)


def _train_transform(config):
    aug = config.AUG
    try:
        return create_transform(
            input_size=config.DATA.IMG_SIZE,
            is_training=True,
            scale=aug.SCALE,
            ratio=aug.RATIO,
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=None if aug.AUTO_AUGMENT in ("none", "") else aug.AUTO_AUGMENT,
            interpolation=config.DATA.INTERPOLATION,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"AUG.AUTO_AUGMENT is {aug.AUTO_AUGMENT!r}, which timm does not understand ({error}); "
            "give a policy such as rand-m9-mstd0.5-inc1, or none"
        ) from error


def _eval_transform(config):
    size = config.DATA.IMG_SIZE
    name = config.DATA.INTERPOLATION
    interpolation = InterpolationMode("bicubic" if name == "random" else name)
    if config.TEST.CROP:
        fit = [transforms.Resize(size * 256 // 224, interpolation), transforms.CenterCrop(size)]
    else:
        fit = [transforms.Resize((size, size), interpolation)]
    normalize = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return transforms.Compose([*fit, transforms.ToTensor(), normalize])


class TrainSet(Dataset):
    """``(epoch, index)`` to ``(tensor, label)``: the augmentation is a function of seed, epoch and index alone.

    So it does not matter which worker of which process makes an image, nor what was made before it, and a run that is
    resumed in the middle of an epoch sees what the uninterrupted one would have seen.

    Args:
        images: gives ``(PIL image, label)`` by index, or raises ImageError or OSError for one that cannot be read.
        transform: from image to tensor.
        seed: of the augmentation.
        skip_bad: whether an image that cannot be read is replaced by the next one and reported in ``bad_images``,
            instead of being an error.
    """

    def __init__(self, images, transform, seed: int, skip_bad: bool = False):
        self.images, self.transform, self.seed = images, transform, seed
        self.classes = images.classes
        self._bad = None
        if skip_bad:
            self._bad = multiprocessing.Queue()  # from the workers to the training process

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        image, label = self._read(index)
        with seeded(self.seed, epoch, index):
            return self.transform(image), label

    def _read(self, index: int):
        for step in range(len(self)):
            try:
                return self.images[(index + step) % len(self)]
            except (ImageError, OSError) as error:
                if self._bad is None:
                    raise
                self._bad.cancel_join_thread()  # a worker's end need not wait for its messages to be read
                self._bad.put(str(error))
        raise ImageError("not one image of the training set can be read")

    def bad_images(self) -> list[str]:
        """What was wrong with the images replaced since the last call, a message each that names the file."""
        messages = []
        with contextlib.suppress(queue.Empty):
            while self._bad is not None:
                messages.append(self._bad.get_nowait())
        return messages


class EvalSet(Dataset):
    """``index`` to ``(tensor, label)`` by a transform without randomness."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image, label = self.images[index]
        return self.transform(image), label


@contextlib.contextmanager
def seeded(*key: int):
    """Inside, Python's, NumPy's and torch's CPU generators are seeded by ``key``; afterwards they are as before."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seeds = [int(word) for word in np.random.SeedSequence(key).generate_state(3, np.uint64)]
    random.seed(seeds[0])
    np.random.seed(seeds[1] % 2**32)
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
