"""The last steps of a batch against timm's and torchvision's; none of them waits for the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.overrides import TorchFunctionMode
from torchvision.transforms import functional as F

from config import load_config
from data import build_train_loader, build_val_loader, loader
from data.augment import Augmentation, Draw, Rectangle
from data.batches import DeviceBatches, ResidentLoader
from data.transforms import Batch

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Loader(list):
    """A list of batches with what DeviceBatches asks a loader for."""

    batch_sampler = None


def batch(images: np.ndarray, erased=None) -> Batch:
    draws = [Draw(Rectangle(0, 0, 1, 1), True, False, [], [], rectangles) for rectangles in erased or []]
    return Batch(torch.from_numpy(images), torch.arange(len(images)), draws, [])


def batches(found, mode="pixel", mixup=None) -> DeviceBatches:
    return DeviceBatches(Loader(found), None, CPU, Augmentation(load_config(opts=["AUG.REMODE", mode])), mixup)


def noise(count=4, size=16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_normalised_as_by_torchvision_to_the_bit():
    images, targets = next(iter(batches([batch(noise())])))
    expected = torch.stack([F.normalize(F.to_tensor(image), MEAN, STD) for image in noise()])
    assert torch.equal(images, expected) and targets.tolist() == [0, 1, 2, 3]
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_fills_the_rectangles(mode):
    """With timm's kinds of fill, each a function of its own seed, and nothing else is touched."""
    erased = [[(Rectangle(2, 3, 10, 12), 7)], [], [(Rectangle(0, 0, 9, 9), 7), (Rectangle(12, 12, 4, 3), 2**62)]]
    plain, found, again = (batches([], mode).finish(batch(noise(3), rows))[0] for rows in (None, erased, erased))
    assert torch.equal(found, again)
    changed = (found != plain).any(dim=1)
    inside = torch.zeros(3, 16, 16, dtype=torch.bool)
    inside[0, 2:12, 3:15] = inside[2, :9, :9] = inside[2, 12:16, 12:15] = True
    assert torch.equal(changed, inside)
    patch = found[0, :, 2:12, 3:15]
    if mode == "const":
        assert not patch.any()
    elif mode == "rand":
        assert torch.equal(patch, patch[:, :1, :1].expand_as(patch)) and len(patch[:, 0, 0].unique()) == 3
    else:
        assert abs(patch.mean()) < 0.2 and 0.85 < patch.std() < 1.15
        assert not torch.equal(patch[:, :4, :3], found[2, :, 12:16, 12:15])


def test_the_noise_is_distributed_as_timms():
    erased = [[(Rectangle(0, 0, 60, 60), 5)]]
    found = batches([]).finish(batch(noise(1, 64), erased))[0][0, :, :60, :60].flatten()
    torch.manual_seed(0)
    timm = torch.zeros(3, 64, 64)
    RandomErasing(1.0, min_area=0.6, max_area=0.7, mode="pixel", device="cpu")(timm)
    levels = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(found.quantile(levels), timm[timm != 0].quantile(levels), atol=0.1, rtol=0)


def test_mixing_draws_when_a_batch_is_handed_over():
    """What a checkpoint saves of NumPy's generator is then where the next batch goes on."""
    mixup = Mixup(0.8, 1.0, num_classes=10)
    np.random.seed(3)
    first = next(iter(batches([batch(noise()), batch(noise())], mixup=mixup)))
    state = np.random.get_state()
    whole = iter(batches([batch(noise()), batch(noise())], mixup=mixup))
    np.random.seed(3)
    assert torch.equal(next(whole)[0], first[0])
    assert np.random.get_state()[2] == state[2]
    second = next(whole)
    np.random.set_state(state)
    resumed = batches([batch(noise())], mixup=mixup)
    assert all(torch.equal(a, b) for a, b in zip(next(iter(resumed)), second, strict=True))
    assert second[1].shape == (4, 10)


@pytest.mark.parametrize("augment_on", ["worker", "device"])
def test_an_augmented_batch_is_bytes_until_the_device(augment_on):
    config = load_config(opts=["DATA.DATASET", "digits", "MODEL.NUM_CLASSES", "10", "DATA.IMG_SIZE", "16",
                               "DATA.NUM_WORKERS", "0", "DATA.AUGMENT_ON", augment_on])
    for build in (build_train_loader, build_val_loader):
        batch = next(iter(build(config).loader))
        assert batch.images.shape == (128, 16, 16, 3) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous() and batch.labels.dtype == torch.int64


# ---- waiting for the device ------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """A tensor that stands for one on a GPU; so does all that is computed from it."""


class Waits(TorchFunctionMode):
    """Notes the calls in which the host would wait for the GPU."""

    READ = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique",
            "unique_consecutive", "masked_select", "argwhere", "equal", "allclose")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        is_copy = function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        is_read = name in self.READ and isinstance(args[0], OnDevice)
        index = args[1] if name == "__getitem__" else None
        is_mask = isinstance(index, OnDevice) and index.dtype == torch.bool
        if is_copy or is_read or is_mask:
            self.found.append(name)
        return function(*args, **kwargs)


def waits(batches: DeviceBatches) -> list[str]:
    """Waits of three updates of a small network, from the batch on, after a first one."""
    source = batches.loader
    if isinstance(source, ResidentLoader):
        source.pixels, source.labels = source.pixels.as_subclass(OnDevice), source.labels.as_subclass(OnDevice)
    else:
        ready = [item for item, _ in zip(source, range(4), strict=False)]
        batches.loader = [replace(item, images=item.images.as_subclass(OnDevice),
                                 labels=item.labels.as_subclass(OnDevice)) for item in ready]
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    optimizer, watched = torch.optim.AdamW(model.parameters()), Waits()
    for number, (images, targets) in enumerate(batches):
        assert type(images) is OnDevice
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        if number == 0:
            watched.__enter__()
        if number == 3:
            break
    watched.__exit__(None, None, None)
    return watched.found


@pytest.mark.parametrize("options", [
    "AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1", "AUG.AUTO_AUGMENT original", "AUG.AUTO_AUGMENT v0", "AUG.AUTO_AUGMENT 3a",
    "AUG.AUTO_AUGMENT augmix-m5-w3", "AUG.AUTO_AUGMENT augmix-m5-w3-b1", "AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0.4",
    "DATA.INTERPOLATION random AUG.AUTO_AUGMENT none", "AUG.REMODE const AUG.RECOUNT 3", "AUG.REMODE rand AUG.MIXUP 0",
    "AUG.MIXUP 0 AUG.CUTMIX 0",
])
@pytest.mark.parametrize("where", ["worker", "device", "resident"])
def test_the_host_never_waits_for_the_device(where, options, monkeypatch):
    """In the path of a batch through every policy, erasing, mixing and resizing."""
    if where == "device":
        monkeypatch.setattr(loader, "is_resident", lambda *_: False)
    config = load_config(opts=["DATA.DATASET", "digits", "MODEL.NUM_CLASSES", "10", "DATA.IMG_SIZE", "16",
                               "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "32", "AUG.REPROB", "1",
                               "DATA.AUGMENT_ON", "worker" if where == "worker" else "device", *options.split()])
    assert waits(build_train_loader(config)) == []


def test_waiting_is_noticed():
    image, watched = torch.zeros(3).as_subclass(OnDevice), Waits()
    with watched:
        torch.tensor([1.0], device="cpu")
        image.sum().item()
        bool(image[0] > 0)
        image[image > 0]
        torch.zeros(3).tolist()
        torch.zeros(3).to("cpu", non_blocking=True)
    assert watched.found == ["tensor", "item", "__bool__", "__getitem__"]
