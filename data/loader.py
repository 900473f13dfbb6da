"""From the config to the batches of training and evaluation."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader

from utils import InputError

from .augment import Augmentation
from .batches import DeviceBatches, ResidentLoader, is_resident
from .datasets import build_dataset, prepare_data  # noqa: F401
from .samplers import TrainBatchSampler, eval_order
from .transforms import Batch, EvalSet, TrainSet

_PREFETCH = 2  # batches that each worker prepares ahead

# The signals that stop a run, if the system has them. Without sigwaitinfo (macOS) a worker cannot tell who sent a
# SIGTERM, so it must not block it.
_KNOWS_SENDER = hasattr(signal, "sigwaitinfo")
_NAMES = ["SIGINT", "SIGUSR1", "SIGTERM"] if _KNOWS_SENDER else ["SIGINT", "SIGUSR1"]
_SIGNALS = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}


def build_train_loader(config, rank: int = 0, world_size: int = 1, device="cpu") -> DeviceBatches:
    """Augmented and mixed batches of one process on its device: float32 (N, 3, S, S) and targets, N = ``BATCH_SIZE``.

    ``loader.batch_sampler`` is a ``TrainBatchSampler``: call its ``set_epoch`` before each epoch. ``len(loader)`` is
    the number of batches of a whole epoch, ``loader.dataset`` an ``ImageSet`` with the names of the classes.

    Raises:
        MissingFileError, InputError: the data set or the config is not usable (see ``datasets.build_dataset``).
    """
    device = torch.device(device)
    images = build_dataset(config, "train", rank, world_size)
    is_sharded = config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part"
    labels = images.labels if config.DATA.BALANCED else None
    sampler = TrainBatchSampler(len(images), config.DATA.BATCH_SIZE, config.SEED, rank, world_size, is_sharded, labels)
    augmentation, on_device = Augmentation(config), augment_on(config, device) == "device"
    if on_device and is_resident(images, config):
        loader = ResidentLoader(images, sampler, config, device, augmentation)
    else:
        dataset = TrainSet(images, augmentation, on_device, config.DATA.SKIP_BAD_IMAGES)
        loader = _Loader(dataset, sampler, config, device)
    return DeviceBatches(loader, images, device, augmentation, build_mixup(config))


def build_val_loader(config, rank: int = 0, world_size: int = 1, device="cpu") -> DeviceBatches:
    """Batches of one process's share of the validation images, shaped as those of ``build_train_loader``.

    Over all ranks each image occurs exactly once: no padding, the last batch may be short, a rank may get no image.
    The target of an image that could not be read is ``transforms.NO_LABEL``.

    Raises:
        MissingFileError, InputError: as ``build_train_loader``; the training images need not exist.
    """
    device, size = torch.device(device), config.DATA.BATCH_SIZE
    images = build_dataset(config, "val", rank, world_size)
    order = eval_order(len(images), rank, world_size)
    batches = [order[begin : begin + size] for begin in range(0, len(order), size)]
    if augment_on(config, device) == "device" and is_resident(images, config) and device.type != "mps":
        loader = ResidentLoader(images, batches, config, device)
    else:
        loader = _Loader(EvalSet(images, config), batches, config, device)
    return DeviceBatches(loader, images, device)


def augment_on(config, device) -> str:
    """Where training images are augmented: ``"worker"`` or ``"device"``, which ``auto`` means on an accelerator."""
    if config.DATA.AUGMENT_ON != "auto":
        return config.DATA.AUGMENT_ON
    return "worker" if torch.device(device).type == "cpu" else "device"


def check_shared_memory(config, folder: str = "/dev/shm") -> None:
    """Raises InputError if ``folder``, where it exists, has too little shared memory for the data workers.

    A worker that writes beyond it dies with a bus error. Docker gives a container 64 MB.
    """
    if not config.DATA.NUM_WORKERS or not os.path.isdir(folder):
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of this machine, set by torchrun
    batches = processes * (_PREFETCH * config.DATA.NUM_WORKERS + 1)  # the last is the one in use
    needed, free = batches * config.DATA.BATCH_SIZE * config.DATA.IMG_SIZE**2 * 3, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the data workers need {needed / 2**20:.0f} MB of shared memory, and {folder} has {free / 2**20:.0f} MB "
            f"free; start the container with --shm-size {-(-2 * needed // 2**30)}g, or lower DATA.NUM_WORKERS (0 needs "
            "none) or --batch-size"
        )


def build_mixup(config) -> Mixup | None:
    """timm's mixup and cutmix, from (images, labels) to (images, smoothed soft targets); None if both are off."""
    aug = config.AUG
    if not (aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX):
        return None
    if config.DATA.BATCH_SIZE % 2:
        raise InputError(
            f"DATA.BATCH_SIZE is {config.DATA.BATCH_SIZE}; it must be even while mixup or cutmix is on, because images "
            "are mixed in pairs (AUG.MIXUP 0 AUG.CUTMIX 0 turns both off)"
        )
    return Mixup(
        aug.MIXUP, aug.CUTMIX, aug.CUTMIX_MINMAX or None, aug.MIXUP_PROB, aug.MIXUP_SWITCH_PROB, aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING, num_classes=config.MODEL.NUM_CLASSES,
    )


class _Loader(DataLoader):
    """A loader whose workers block the stop signals from the beginning, and are killed if they hang.

    A stop signal often reaches them too, while the training process still needs them to finish its update. They hang
    where a network drive stalls. PyTorch's own ``timeout`` does not see all of that: a batch may be announced, but its
    memory must be fetched from a worker that is stopped.
    """

    def __init__(self, dataset, batch_sampler, config, device: torch.device):
        check_shared_memory(config)
        workers = config.DATA.NUM_WORKERS
        super().__init__(
            dataset, batch_sampler=batch_sampler, collate_fn=Batch.of, num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None, persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",  # page-locked, so that copies to the GPU do not wait
            worker_init_fn=_end_with_the_parent,
            generator=torch.Generator(),  # otherwise each new iterator would draw from the global one
        )
        self.patience = 60 * config.HANG_MINUTES  # seconds to wait for a batch

    def __iter__(self):
        batches, self.has_killed = self._start(), False
        if not self.num_workers:
            yield from batches
            return
        while True:
            timer = threading.Timer(self.patience, self._kill)
            timer.daemon = True
            timer.start()
            try:
                batch = next(batches, None)
            except Exception as error:
                if not self.has_killed:
                    raise
                for _ in range(2):  # PyTorch's handler raises an error about a killed worker wherever Python is then
                    with contextlib.suppress(RuntimeError, AttributeError):  # Windows has no SIGCHLD
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                raise RuntimeError("DataLoader timed out") from error
            finally:
                timer.cancel()
            if batch is None:
                return
            yield batch

    def _kill(self) -> None:
        self.has_killed = True
        for worker in multiprocessing.active_children():
            worker.kill()

    def _start(self):
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
