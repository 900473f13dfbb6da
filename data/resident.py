"""Small data sets that are kept on the device as bytes, cropped and resized there, without workers."""

from collections.abc import Iterator

import numpy as np
import torch

from .augment import encode
from .datasets import ArrayDataset
from .resize import resize_crops
from .samplers import TrainBatchSampler
from .transforms import Sample, TrainDraws, eval_size


def fits(images, config) -> bool:
    """Whether a data set can be kept on the device: it is in memory, and its images are no larger than the input size.

    Only for those does the resizing on the device equal Pillow's bit for bit.
    """
    return isinstance(images, ArrayDataset) and max(images.images.shape[1:3]) <= config.DATA.IMG_SIZE


class _Resident:
    """The common part of both splits: images uint8 (N, H, W, 3) and labels on the device."""

    def __init__(self, images: ArrayDataset, device: torch.device):
        self.images, self.classes, self.labels = images, images.classes, images.labels
        self.pixels = torch.from_numpy(images.images).to(device)
        self.targets = torch.tensor(images.labels, device=device)

    def __len__(self) -> int:
        return len(self.images)

    def bad_images(self) -> list[str]:
        """Empty: images in memory cannot be damaged files."""
        return []


class ResidentTrainLoader:
    """Training batches like those of a worker that leaves the augmentation to the device, prepared on the device.

    Args:
        images: the data set.
        draws: of the augmentation.
        sampler: yields the batches as lists of ``(epoch, index)``.
        device: the device of the images.
    """

    def __init__(self, images: ArrayDataset, draws: TrainDraws, sampler: TrainBatchSampler, device: torch.device):
        self.dataset, self.draws, self.batch_sampler = _Resident(images, device), draws, sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Sample]:
        pixels, targets = self.dataset.pixels, self.dataset.targets
        height, width = pixels.shape[1:3]
        for keys in self.batch_sampler:
            crops, bicubic, draws, erased = zip(*(self.draws.draw(*key, width, height) for key in keys), strict=True)
            index = torch.tensor([index for _, index in keys]).to(pixels.device, non_blocking=True)
            crops = torch.tensor(crops).to(pixels.device, non_blocking=True)
            yield Sample(
                images=_resize(pixels[index], crops, self.draws.size, bicubic),
                targets=targets[index],
                steps=torch.from_numpy(np.stack([encode(draw.steps) for draw in draws])),
                weights=torch.tensor([draw.weights for draw in draws]),
                erased=torch.from_numpy(np.stack(erased)),
            )


class ResidentEvalLoader:
    """Validation batches, resized on the device with Pillow's results bit for bit.

    Args:
        images: the data set.
        config: the run's config.
        order: the images of this process.
        device: the device of the images.
    """

    batch_sampler = None

    def __init__(self, images: ArrayDataset, config, order: range, device: torch.device):
        self.dataset, self.order, self.batch_size = _Resident(images, device), order, config.DATA.BATCH_SIZE
        self.size, self.window = config.DATA.IMG_SIZE, None
        self.bicubic = config.DATA.INTERPOLATION != "bilinear"
        if config.TEST.CROP:
            self.size = eval_size(config)
            first = round((self.size - config.DATA.IMG_SIZE) / 2)
            self.window = first, first + config.DATA.IMG_SIZE

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Sample]:
        pixels, targets = self.dataset.pixels, self.dataset.targets
        whole = torch.tensor([0, 0, *pixels.shape[1:3]], device=pixels.device)
        for begin in range(0, len(self.order), self.batch_size):
            index = torch.tensor(self.order[begin : begin + self.batch_size]).to(pixels.device, non_blocking=True)
            images = resize_crops(pixels[index], whole.expand(len(index), 4), self.size, self.window, self.bicubic)
            none = torch.zeros(len(index), 0, 3), torch.zeros(len(index), 0), torch.zeros(len(index), 0, 5).long()
            yield Sample(images, targets[index], *none)


def _resize(images: torch.Tensor, crops: torch.Tensor, size: int, bicubic: tuple[bool, ...]) -> torch.Tensor:
    if all(bicubic) or not any(bicubic):
        return resize_crops(images, crops, size, bicubic=bicubic[0])
    chosen = torch.tensor(bicubic, device=images.device)[:, None, None, None]
    return torch.where(chosen, resize_crops(images, crops, size), resize_crops(images, crops, size, bicubic=False))
