"""From the files of a data set to the batches of a training step."""

__all__ = ["DeviceBatches", "augment_on", "build_mixup", "build_train_loader", "build_val_loader", "prepare_data"]


def __getattr__(name: str):
    """The names above, imported when they are used, so that tools that list files need not import PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loader

    return getattr(loader, name)
