"""On the device, from batches of bytes to batches for the network: copy, augment, normalise, erase, mix."""

from collections.abc import Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup

from . import augment_batch
from .augment import Augmentation, Rectangle
from .datasets import ArraySet
from .images import ImageSet
from .transforms import Batch, eval_size


class DeviceBatches:
    """Batches for the network: normalised float32 (N, 3, S, S), channels last, and targets, on the device.

    Batches arrive as bytes, a quarter of the size of floats, and are copied without waiting for the device.

    Args:
        loader: yields a ``Batch`` in CPU memory or on the device.
        images: the data set; also the attribute ``dataset``.
        device: the device of the batches.
        augmentation: of the batches, or None.
        mixup: timm's Mixup, which turns targets into soft ones, or None. It draws from NumPy's global generator.
    """

    def __init__(self, loader, images: ImageSet, device: torch.device, augmentation: Augmentation | None = None,
                 mixup: Mixup | None = None):
        self.loader, self.dataset, self.batch_sampler, self.device = loader, images, loader.batch_sampler, device
        self.augmentation, self.mixup = augmentation, mixup
        self._errors = []
        self._generator = torch.Generator(device)  # of the noise in erased rectangles
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1)
                     for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self._mean, self._std = mean, std

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self.loader:
            self._errors += batch.errors
            yield self.finish(batch)

    def bad_images(self) -> list[str]:
        """The errors of the images skipped since the last call, each a message that names the file."""
        errors, self._errors = self._errors, []
        return errors

    def finish(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of a batch."""
        images, targets = (tensor.to(self.device, non_blocking=True) for tensor in (batch.images, batch.labels))
        images = images.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W), channels last
        if any(draw.flip or draw.chains or draw.steps for draw in batch.draws):
            images = augment_batch.augment(images, batch.draws)
        images = images.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(self._mean).div_(self._std)
        for image, draw in zip(images, batch.draws, strict=False):
            for place, seed in draw.erased:
                self._erase(image, place, seed)
        return self.mixup(images, targets) if self.mixup else (images, targets)

    def _erase(self, image: torch.Tensor, place: Rectangle, seed: int) -> None:
        """Fills a rectangle; its noise depends only on its seed."""
        top, left, height, width = place
        part, mode = image[:, top : top + height, left : left + width], self.augmentation.erase_mode
        if mode == "const":
            part.zero_()
            return
        shape = (3, height, width) if mode == "pixel" else (3, 1, 1)
        self._generator.manual_seed(seed)
        part.copy_(torch.randn(shape, generator=self._generator, device=image.device))


class ResidentLoader:
    """Batches of a small data set that is kept on the device as bytes, and cropped and resized there, without workers.

    ``batch_sampler`` yields lists of ``(epoch, index)``, or of ``index`` without an augmentation: then the crops are
    those of an evaluation.
    """

    def __init__(self, images: ArraySet, batch_sampler, config, device: torch.device,
                 augmentation: Augmentation | None = None):
        self.batch_sampler, self.augmentation = batch_sampler, augmentation
        self.pixels, self.labels = torch.from_numpy(images.images).to(device), torch.tensor(images.labels).to(device)
        self.size, self.window = config.DATA.IMG_SIZE, None
        self.bicubic = config.DATA.INTERPOLATION != "bilinear"
        if config.TEST.CROP and not augmentation:
            self.size = eval_size(config)
            first = round((self.size - config.DATA.IMG_SIZE) / 2)
            self.window = first, first + config.DATA.IMG_SIZE

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        height, width = self.pixels.shape[1:3]
        for keys in self.batch_sampler:
            draws, indices = [], list(keys)
            crops, bicubic = [(0, 0, height, width)] * len(indices), [self.bicubic] * len(indices)
            if self.augmentation:
                draws = [self.augmentation.draw(*key, width, height) for key in keys]
                indices, crops = [index for _, index in keys], [draw.crop for draw in draws]
                bicubic = [draw.bicubic for draw in draws]
            indices, crops, bicubic = (torch.tensor(values).to(self.pixels.device, non_blocking=True)
                                       for values in (indices, crops, bicubic))
            images = augment_batch.resize_crops(self.pixels[indices], crops, self.size, bicubic, self.window)
            yield Batch(images, self.labels[indices], draws, [])


def is_resident(images: ImageSet, config) -> bool:
    """Whether a data set can be kept on the device: it is in memory, and its images are no larger than the input size.

    Only for those does the resizing on the device equal Pillow's bit for bit.
    """
    return isinstance(images, ArraySet) and max(images.images.shape[1:3]) <= config.DATA.IMG_SIZE
