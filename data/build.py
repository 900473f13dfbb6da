"""From the config to loaders and mixup."""

import os
import signal
import threading

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader

from .cifar import CIFAR, download_cifar
from .datasets import build_dataset, data_path
from .samplers import TrainBatchSampler, eval_order
from .transforms import EvalSet, TrainSet, build_transform

# By which a run is told to stop, where the system has them. Without sigwaitinfo (macOS) a worker cannot tell whose
# SIGTERM it gets, and must not be deaf to it.
_KNOWS_SENDER = hasattr(signal, "sigwaitinfo")
_NAMES = ["SIGINT", "SIGUSR1", "SIGTERM"] if _KNOWS_SENDER else ["SIGINT", "SIGUSR1"]
_SIGNALS = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}


def prepare_data(config) -> None:
    """Downloads CIFAR-10 or CIFAR-100 where it is not there yet; call it in one process per node, before the loaders.

    Raises:
        FileNotFoundError: the download failed; the message says what to put where.
    """
    if config.DATA.DATASET in CIFAR:
        download_cifar(config.DATA.DATASET, data_path(config))


def build_train_loader(config, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Augmented batches of one process: images float32 (N, 3, S, S) and labels int64 (N,), N = ``DATA.BATCH_SIZE``.

    ``loader.batch_sampler`` is a ``TrainBatchSampler``: call its ``set_epoch`` before each epoch. ``len(loader)`` is
    the number of batches of a whole epoch, ``loader.dataset.classes`` the list of class names.

    Raises:
        FileNotFoundError, ValueError: the data set or the config is not usable (see ``datasets.build_dataset``).
    """
    _check_channels(config)
    images = build_dataset(config, "train", rank, world_size)
    sampler = TrainBatchSampler(
        len(images),
        config.DATA.BATCH_SIZE,
        config.SEED,
        rank,
        world_size,
        sharded=config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part",
    )
    dataset = TrainSet(images, build_transform(config, train=True), config.SEED, config.DATA.SKIP_BAD_IMAGES)
    return _Loader(dataset, batch_sampler=sampler, **_loading(config))


def build_val_loader(config, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Batches of one process's share of the validation images, shaped as those of ``build_train_loader``.

    Over all ranks each image comes exactly once: no padding, the last batch may be short, a rank may get no image.

    Raises:
        FileNotFoundError, ValueError: as ``build_train_loader``; the training images need not be there.
    """
    _check_channels(config)
    images = build_dataset(config, "val", rank, world_size)
    dataset = EvalSet(images, build_transform(config, train=False))
    order = eval_order(len(images), rank, world_size)
    return _Loader(dataset, config.DATA.BATCH_SIZE, sampler=order, **_loading(config))


def build_mixup(config) -> Mixup | None:
    """timm's mixup and cutmix, from (images, labels) to (images, smoothed soft targets); None where both are off.

    Raises:
        ValueError: the batch size is odd.
    """
    aug = config.AUG
    if not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise ValueError(
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}; it must be even while mixup or cutmix is on, because images "
            "are mixed in pairs (AUG.MIXUP 0 AUG.CUTMIX 0 turns both off)"
        )
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX or None,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )


def _check_channels(config) -> None:
    channels = config.MODEL.STRIP_MLP.IN_CHANS
    if channels != 3:
        raise ValueError(f"MODEL.STRIP_MLP.IN_CHANS is {channels}, but the data pipeline makes RGB images; set it to 3")


def _loading(config) -> dict:
    return {
        "num_workers": config.DATA.NUM_WORKERS,
        "persistent_workers": config.DATA.NUM_WORKERS > 0,
        "pin_memory": config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        "worker_init_fn": _end_with_the_parent,
        "generator": torch.Generator(),  # else each new iterator would draw from the global one
    }


class _Loader(DataLoader):
    """Its workers are deaf to signals from their first moment.

    A signal to stop often reaches them as well; the training process still needs them then to finish its update.
    """

    def __iter__(self):
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_with_the_parent(worker: int) -> None:
    """Lets SIGTERM end a worker when it comes from the training process, as it does when that one ends."""

    def wait_for_the_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if _KNOWS_SENDER:
        threading.Thread(target=wait_for_the_parent, daemon=True).start()
