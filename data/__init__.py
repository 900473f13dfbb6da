"""Everything between the files of a data set and the batches of a training step."""

from .build import build_mixup, build_train_loader, build_val_loader, prepare_data

__all__ = ["build_mixup", "build_train_loader", "build_val_loader", "prepare_data"]
