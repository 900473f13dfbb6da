"""The last steps of a batch, on the device: copy, augment, normalise, erase, mix."""

from collections.abc import Iterator

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup

from . import device_ops
from .augment import Policy
from .transforms import Sample


class DeviceBatches:
    """Batches for the network: normalised float32 (N, 3, S, S), channels last, and targets, on the device.

    Batches arrive as bytes, a quarter of the size of floats. On CUDA the next batch is copied on a separate stream
    while the network processes the current one.

    Args:
        loader: yields a ``Sample`` for each batch, in CPU memory or on the device.
        device: the device of the batches.
        policy: the policy of the augmentation steps to apply on the device, or None.
        erase_mode: what erased rectangles are filled with: ``"pixel"`` (noise), ``"rand"`` (one random colour) or
            ``"const"`` (the mean colour).
        mixup: timm's Mixup, which turns targets into soft ones, or None. Its draws come from NumPy's global generator
            when a batch is returned, not when it is copied, so that a resumed run continues with the same ones.

    Attributes:
        dataset, batch_sampler: the loader's.
    """

    def __init__(self, loader, device: torch.device, policy: Policy | None = None, erase_mode="pixel",
                 mixup: Mixup | None = None):  # fmt: skip
        self.loader, self.device, self.policy = loader, device, policy
        self.erase_mode, self.mixup = erase_mode, mixup
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler
        self._generator = torch.Generator(device)  # of the noise in erased rectangles
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1)
                     for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))  # fmt: skip
        self._mean, self._std = mean, std

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in copied_ahead(self.loader, self.device):
            yield self.finish(batch)

    def finish(self, batch: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and targets of a batch whose images are on the device."""
        images = batch.images.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W), channels last
        if self.policy and batch.steps.shape[1]:
            images = device_ops.augment(images, self.policy, batch.steps, batch.weights)
        images = images.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(self._mean).div_(self._std)
        self._erase(images, batch.erased)
        targets = batch.targets
        if self.mixup:
            images, targets = self.mixup(images, targets)
        return images, targets

    def _erase(self, images: torch.Tensor, erased: torch.Tensor) -> None:
        """Fills rectangles, given as int64 (N, R, 5) on the CPU; the noise of each depends only on its own seed."""
        for image, rectangles in zip(images, erased.tolist(), strict=True):
            for top, left, height, width, seed in rectangles:
                if height == 0:
                    continue
                part = image[:, top : top + height, left : left + width]
                if self.erase_mode == "const":
                    part.zero_()
                    continue
                shape = (3, height, width) if self.erase_mode == "pixel" else (3, 1, 1)
                self._generator.manual_seed(seed)
                part.copy_(torch.randn(shape, generator=self._generator, device=images.device))


def copied_ahead(batches, device: torch.device) -> Iterator[Sample]:
    """Batches with images and targets on the device; tensors that only the CPU reads stay there.

    On CUDA the copy of the next batch starts before a batch is returned.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch._replace(images=batch.images.to(device), targets=batch.targets.to(device))
        return
    stream = torch.cuda.Stream(device)

    def copy(batch: Sample | None) -> Sample | None:
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch._replace(images=batch.images.to(device, non_blocking=True),
                                  targets=batch.targets.to(device, non_blocking=True))  # fmt: skip

    batches = iter(batches)
    following = copy(next(batches, None))
    while following is not None:
        batch = following
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in (batch.images, batch.targets):
            tensor.record_stream(current)  # its memory was allocated for the other stream
        following = copy(next(batches, None))
        yield batch
