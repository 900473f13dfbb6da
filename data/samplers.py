"""Which process sees which image when, as a function of seed, epoch and rank only."""

import numpy as np
from torch.utils.data import Sampler

from utils import InputError


class TrainBatchSampler(Sampler):
    """Batches of one process, as lists of ``(epoch, index)``; call ``set_epoch`` before each pass.

    All processes walk through one permutation of the images. The j-th batches of all ranks together are a slice of it,
    which depends on ``batch_size * world_size`` but not on how that product is split. Images that do not fill a last
    batch are skipped in that epoch.

    Args:
        num_images: size of the training set.
        batch_size: images per process and batch.
        seed: determines the order, together with the epoch.
        rank, world_size: this process and the number of them.
        sharded: every rank permutes only its own images, ``rank, rank + world_size, ...`` (it holds no others).
        labels: of the images, to draw every class equally often, with replacement, instead of every image once.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, sharded=False,
                 labels: list[int] | None = None):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.weights = None if labels is None else 1 / np.bincount(labels)[labels]
        self.rank, self.world_size, self.sharded = rank, world_size, sharded
        self.epoch = self.start_batch = 0
        if len(self) == 0:
            raise InputError(
                f"the training set has {num_images} images, fewer than one batch of {batch_size} x {world_size} "
                "(images per process x processes); lower --batch-size"
            )

    def __len__(self) -> int:
        """Batches in a whole epoch, the same on every rank."""
        return self.num_images // self.world_size // self.batch_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next pass yields the batches of ``epoch`` from ``start_batch`` on; ValueError if it has fewer."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch is {start_batch}; an epoch has {len(self)} batches")
        self.epoch, self.start_batch = epoch, start_batch

    def __iter__(self):
        images, key, first, stride = np.arange(self.num_images), (self.seed, self.epoch), self.rank, self.world_size
        if self.sharded:
            images, key, first, stride = images[self.rank :: self.world_size], (*key, self.rank), 0, 1
        rng, epoch = np.random.default_rng(key), self.epoch
        if self.weights is None:
            order = rng.permutation(images)
        else:
            weights = self.weights[images]
            order = rng.choice(images, len(images), p=weights / weights.sum())
        for batch in range(self.start_batch, len(self)):
            begin = (first + batch * stride) * self.batch_size
            yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]


def eval_order(num_images: int, rank: int = 0, world_size: int = 1) -> range:
    """The images that one rank evaluates: over all ranks each image once, without padding."""
    return range(rank, num_images, world_size)
