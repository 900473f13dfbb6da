"""From the config to the batches of training and evaluation."""

import os
import shutil
import signal
import threading

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader

from utils import InputError

from . import resident
from .cifar import CIFAR, download_cifar
from .datasets import FOLDER_SETS, build_dataset, data_path, prepare_listings
from .device import DeviceBatches
from .samplers import TrainBatchSampler, eval_order
from .transforms import EvalSet, TrainDraws, TrainSet

_PREFETCH = 2  # batches that each worker prepares ahead

# The signals that stop a run, if the system has them. Without sigwaitinfo (macOS) a worker cannot tell who sent a
# SIGTERM, so it must not block it.
_KNOWS_SENDER = hasattr(signal, "sigwaitinfo")
_NAMES = ["SIGINT", "SIGUSR1", "SIGTERM"] if _KNOWS_SENDER else ["SIGINT", "SIGUSR1"]
_SIGNALS = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}


def prepare_data(config) -> None:
    """The work to be done once per machine: downloads CIFAR, lists folders, indexes shards. Call it before the loaders.

    Raises:
        MissingFileError: the download failed; the message says which file to put where.
        InputError: a data set's files are not usable.
    """
    if config.DATA.DATASET in CIFAR:
        download_cifar(config.DATA.DATASET, data_path(config), config.DATA.MIRROR)
    elif config.DATA.DATASET in FOLDER_SETS and not config.DATA.ZIP_MODE:
        prepare_listings(data_path(config))


def build_train_loader(config, rank: int = 0, world_size: int = 1, device="cpu") -> DeviceBatches:
    """Augmented and mixed batches of one process on its device: float32 (N, 3, S, S) and targets, N = ``BATCH_SIZE``.

    ``loader.batch_sampler`` is a ``TrainBatchSampler``: call its ``set_epoch`` before each epoch. ``len(loader)`` is
    the number of batches of a whole epoch, ``loader.dataset.classes`` the list of class names.

    Raises:
        MissingFileError, InputError: the data set or the config is not usable (see ``datasets.build_dataset``).
    """
    _check_channels(config)
    device, on_device = torch.device(device), augment_on(config, device) == "device"
    images = build_dataset(config, "train", rank, world_size)
    sampler = TrainBatchSampler(
        len(images),
        config.DATA.BATCH_SIZE,
        config.SEED,
        rank,
        world_size,
        sharded=config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part",
    )
    draws = TrainDraws(config)
    if on_device and resident.fits(images, config):
        loader = resident.ResidentTrainLoader(images, draws, sampler, device)
    else:
        dataset = TrainSet(images, draws, on_device, config.DATA.SKIP_BAD_IMAGES)
        loader = _Loader(dataset, batch_sampler=sampler, **_loading(config, device))
    return DeviceBatches(loader, device, draws.policy if on_device else None, config.AUG.REMODE, build_mixup(config))


def build_val_loader(config, rank: int = 0, world_size: int = 1, device="cpu") -> DeviceBatches:
    """Batches of one process's share of the validation images, shaped as those of ``build_train_loader``.

    Over all ranks each image occurs exactly once: no padding, the last batch may be short, a rank may get no image.

    Raises:
        MissingFileError, InputError: as ``build_train_loader``; the training images need not exist.
    """
    _check_channels(config)
    device = torch.device(device)
    images = build_dataset(config, "val", rank, world_size)
    order = eval_order(len(images), rank, world_size)
    if augment_on(config, device) == "device" and resident.fits(images, config) and device.type != "mps":
        loader = resident.ResidentEvalLoader(images, config, order, device)
    else:
        loader = _Loader(EvalSet(images, config), config.DATA.BATCH_SIZE, sampler=order, **_loading(config, device))
    return DeviceBatches(loader, device)


def augment_on(config, device) -> str:
    """Where training images are augmented: ``"worker"`` or ``"device"``, which ``auto`` means on an accelerator."""
    if config.DATA.AUGMENT_ON != "auto":
        return config.DATA.AUGMENT_ON
    return "worker" if torch.device(device).type == "cpu" else "device"


def shared_memory_needed(config) -> int:
    """The most shared memory (``/dev/shm``), in bytes, that the batches of one process's data workers take."""
    batch = config.DATA.BATCH_SIZE * config.DATA.IMG_SIZE**2 * 3
    return batch * (_PREFETCH * config.DATA.NUM_WORKERS + 1)  # plus the one in use


def check_shared_memory(config, folder: str = "/dev/shm") -> None:
    """Raises InputError if the machine has too little shared memory for the data workers.

    A worker that writes beyond it dies with a bus error. Docker gives a container 64 MB.

    Args:
        config: the run's config.
        folder: the system's folder for shared memory; if it does not exist, nothing is checked.
    """
    if not config.DATA.NUM_WORKERS or not os.path.isdir(folder):
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of this machine, set by torchrun
    needed, free = processes * shared_memory_needed(config), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the data workers need {needed / 2**20:.0f} MB of shared memory, and {folder} has {free / 2**20:.0f} MB "
            f"free; start the container with --shm-size {-(-2 * needed // 2**30)}g, or lower DATA.NUM_WORKERS (0 needs "
            "none) or --batch-size"
        )


def build_mixup(config) -> Mixup | None:
    """timm's mixup and cutmix, from (images, labels) to (images, smoothed soft targets); None if both are off.

    Raises:
        InputError: the batch size is odd.
    """
    aug = config.AUG
    if not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise InputError(
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
        raise InputError(f"MODEL.STRIP_MLP.IN_CHANS is {channels}, but the data sets hold RGB images; set it to 3")


def _loading(config, device: torch.device) -> dict:
    check_shared_memory(config)
    workers = config.DATA.NUM_WORKERS
    return {
        "num_workers": workers,
        "prefetch_factor": _PREFETCH if workers else None,
        "persistent_workers": workers > 0,
        "pin_memory": device.type == "cuda",  # page-locked, so that copies to the GPU do not wait
        "worker_init_fn": _end_with_the_parent,
        "generator": torch.Generator(),  # otherwise each new iterator would draw from the global one
    }


class _Loader(DataLoader):
    """A loader whose workers block the stop signals from the beginning.

    A stop signal often reaches them too, while the training process still needs them to finish its update.
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
    """Lets SIGTERM end a worker only if the training process sent it, as it does when it ends."""

    def wait_for_the_parent():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    if _KNOWS_SENDER:
        threading.Thread(target=wait_for_the_parent, daemon=True).start()
