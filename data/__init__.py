"""From the files of a data set to the batches of a training step."""

from .build import augment_on, build_mixup, build_train_loader, build_val_loader, prepare_data, shared_memory_needed
from .device import DeviceBatches

__all__ = ["DeviceBatches", "augment_on", "build_mixup", "build_train_loader", "build_val_loader", "prepare_data",
           "shared_memory_needed"]
