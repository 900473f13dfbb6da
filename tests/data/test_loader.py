import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import load_config
from data import (
    augment_on,
    build_mixup,
    build_train_loader,
    build_val_loader,
    cifar,
    prepare_data,
)
from data import (
    loader as loaders,
)
from data.batches import ResidentLoader
from data.images import ImageError
from data.loader import check_shared_memory
from data.samplers import TrainBatchSampler
from utils import InputError


def config(*opts):
    base = (
        "DATA.DATASET digits MODEL.NUM_CLASSES 10 DATA.IMG_SIZE 16 DATA.BATCH_SIZE 128 DATA.NUM_WORKERS 0 "
        "AUG.MIXUP 0 AUG.CUTMIX 0"
    )
    return load_config(opts=[*base.split(), *map(str, opts)])


def passes(loader, epoch=0, start_batch=0, most=None):
    loader.batch_sampler.set_epoch(epoch, start_batch)
    return [batch for batch, _ in zip(loader, range(most or len(loader)), strict=False)]


def equal(first, second) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def global_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_training_batches():
    loader = build_train_loader(config())
    assert isinstance(loader.batch_sampler, TrainBatchSampler) and loader.dataset.classes == list("0123456789")
    batches = passes(loader)
    assert len(batches) == len(loader) == 1437 // 128
    for images, labels in batches:
        assert images.shape == (128, 3, 16, 16) and images.dtype == torch.float32
        assert labels.shape == (128,) and labels.dtype == torch.int64


@pytest.fixture(scope="module", params=["worker", "device"])
def augmented_on(request):
    return request.param


@pytest.fixture(scope="module")
def reference(augmented_on):
    """The first batches of epochs 0 and 1 and the last ones of epoch 1, made in the training process."""
    return some_passes(build_train_loader(config("DATA.AUGMENT_ON", augmented_on)))


def some_passes(loader):
    return passes(loader, most=2), passes(loader, 1, most=2), passes(loader, 1, start_batch=9)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_the_workers(workers, augmented_on, reference, monkeypatch):
    if augmented_on == "device" and workers:  # crops by workers, the rest on the device
        monkeypatch.setattr(loaders, "is_resident", lambda *_: False)
        single = build_train_loader(config("DATA.AUGMENT_ON", "device"))
        reference = some_passes(single)
    loader = build_train_loader(config("DATA.NUM_WORKERS", workers, "DATA.AUGMENT_ON", augmented_on))
    before = global_states()
    assert equal(passes(loader, epoch=1, most=2), reference[1])  # left in the middle
    assert equal(passes(loader, most=2), reference[0])
    assert equal(passes(loader, 1, start_batch=9), reference[2])
    assert global_states() == before


def test_epochs_and_seeds_differ(augmented_on, reference):
    other = passes(build_train_loader(config("SEED", 1, "DATA.AUGMENT_ON", augmented_on)), most=1)
    for batches in (reference[1], other):
        assert not torch.equal(batches[0][1], reference[0][0][1])


def test_two_ranks_make_the_batches_of_one(augmented_on, reference):
    options = config("DATA.BATCH_SIZE", 64, "DATA.AUGMENT_ON", augmented_on)
    ranks = [passes(build_train_loader(options, rank, 2), most=2) for rank in range(2)]
    joined = [tuple(torch.cat(parts) for parts in zip(*pair, strict=True)) for pair in zip(*ranks, strict=True)]
    assert equal(joined, reference[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_validation_counts_each_image_once(workers, world_size):
    options = config("DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 50)
    whole = build_val_loader(options)
    images = torch.cat([images for images, _ in whole])
    before = global_states()
    for rank in range(world_size):
        loader = build_val_loader(options, rank, world_size)
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader) == -(-len(range(rank, 360, world_size)) // 50)
            assert torch.equal(torch.cat([batch for batch, _ in batches]), images[rank::world_size])
            labels = torch.cat([labels for _, labels in batches])
            assert labels.tolist() == whole.dataset.labels[rank::world_size]
    assert global_states() == before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_may_get_no_image(workers):
    loader = build_val_loader(config("DATA.NUM_WORKERS", workers), rank=360, world_size=361)
    assert list(loader) == [] and len(loader) == 0


@pytest.mark.parametrize("build", [build_train_loader, build_val_loader])
def test_workers_persist(build):
    loader = build(config("DATA.NUM_WORKERS", 2)).loader
    assert loader.persistent_workers and loader.num_workers == 2 and not loader.pin_memory
    assert not build(config("DATA.NUM_WORKERS", 0)).loader.persistent_workers


def test_where_images_are_augmented():
    assert [augment_on(config(), device) for device in ("cpu", "cuda", "mps")] == ["worker", "device", "device"]
    for choice in ("worker", "device"):
        assert {augment_on(config("DATA.AUGMENT_ON", choice), device) for device in ("cpu", "cuda")} == {choice}


@pytest.fixture
def small_folder(tmp_path):
    """A file system of 1 MB in memory, as Docker's shared memory is one of 64."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_too_little_shared_memory_is_an_error(small_folder, monkeypatch):
    """Each process needs 9 batches of 100 images, 0.66 MB: one fits, two do not, nor one beside other files."""
    needed = config("DATA.NUM_WORKERS", 4, "DATA.BATCH_SIZE", 100)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    check_shared_memory(needed, small_folder)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="need 1 MB of shared memory, and .* 1 MB free; .*--shm-size 1g.*NUM_WORKERS"):
        check_shared_memory(needed, small_folder)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    (small_folder / "another's").write_bytes(bytes(2**19))
    with pytest.raises(InputError, match="need 1 MB of shared memory, and .* 0 MB free"):
        check_shared_memory(needed, small_folder)
    check_shared_memory(config("DATA.NUM_WORKERS", 0), small_folder)
    check_shared_memory(needed, small_folder / "not there")


# ---- images on the device --------------------------------------------------------------------------


def test_small_images_live_on_the_device():
    train, val = (make(config("DATA.AUGMENT_ON", "device")) for make in (build_train_loader, build_val_loader))
    assert isinstance(train.loader, ResidentLoader) and isinstance(val.loader, ResidentLoader)
    assert train.dataset.classes == val.dataset.classes == list("0123456789") and len(val) == 3
    smaller = build_train_loader(config("DATA.AUGMENT_ON", "device", "DATA.IMG_SIZE", 4))
    assert not isinstance(smaller.loader, ResidentLoader)  # Pillow shrinks in an order of its own


@pytest.mark.parametrize("crop", [True, False])
def test_evaluation_on_the_device_changes_no_bit(crop):
    worker, device = (build_val_loader(config("DATA.AUGMENT_ON", where, "TEST.CROP", crop))
                      for where in ("worker", "device"))
    assert equal(worker, device)


def test_training_on_the_device_shows_the_same_images():
    """The worker's crops are PyTorch's, within 2 levels of Pillow's; then both get the same steps and rectangles."""
    worker, device = (passes(build_train_loader(config("DATA.AUGMENT_ON", where)), epoch=1, most=3)
                      for where in ("worker", "device"))
    for (a, targets), (b, others) in zip(worker, device, strict=True):
        assert torch.equal(targets, others)
        assert ((a - b).abs() < 0.05).float().mean() > 0.99


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match="the training set has 1437 images, fewer than one batch of 512 x 3"):
        build_train_loader(config("DATA.BATCH_SIZE", 512), world_size=3)


@pytest.mark.parametrize("build", [build_train_loader, build_val_loader])
def test_only_rgb(build):
    with pytest.raises(ValueError, match=r"MODEL\.STRIP_MLP\.IN_CHANS is 1, but the data sets hold RGB images"):
        build(config("MODEL.STRIP_MLP.IN_CHANS", 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_by_workers_too(workers, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    options = config("DATA.DATASET", "imagefolder", "DATA.DATA_PATH", tmp_path, "MODEL.NUM_CLASSES", 1,
                     "DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 1, "AUG.MIXUP", 0, "AUG.CUTMIX", 0)
    for loader in (build_train_loader(options), build_val_loader(options)):
        with pytest.raises(ImageError, match=r"cat/broken\.jpg (is not an image|cannot be decoded)"):
            list(loader)


# ---- zip form ------------------------------------------------------------------------------------


def write_zip(root: Path) -> None:
    """20 images of two classes in each split; all pixels of image i have the value 10 * i."""
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive, open(root / f"{split}_map.txt", "w") as lines:
            for index in range(20):
                Image.new("L", (4, 4), 10 * index).save(root / "image.png")
                archive.write(root / "image.png", f"{index}.png")
                lines.write(f"{index}.png\t{index % 2}\n")


def zip_config(root, cache):
    return config(
        "DATA.DATASET", "imagefolder", "DATA.DATA_PATH", root, "DATA.ZIP_MODE", True, "DATA.CACHE_MODE", cache,
        "MODEL.NUM_CLASSES", 2, "DATA.BATCH_SIZE", 4, "AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0,
        "AUG.REPROB", 0, "DATA.NUM_WORKERS", 2,
    )


def image_numbers(batches) -> list[int]:
    """Which images of ``write_zip`` are in the batches."""
    red = torch.cat([images for images, _ in batches])[:, 0].mean(dim=(1, 2))
    return ((red * 0.229 + 0.485) * 25.5).round().int().tolist()


@pytest.mark.parametrize("cache", ["no", "part", "full"])
def test_zip_training_and_validation(cache, tmp_path):
    write_zip(tmp_path)
    seen = []
    for rank in range(2):
        loader = build_train_loader(zip_config(tmp_path, cache), rank, 2)
        numbers = image_numbers(passes(loader))
        assert len(loader) == 2 and len(set(numbers)) == 8
        if cache == "part":
            assert set(numbers) <= set(range(rank, 20, 2))
            assert set(loader.dataset._cache) == set(range(rank, 20, 2))
        seen += numbers
        shard = image_numbers(list(build_val_loader(zip_config(tmp_path, cache), rank, 2)))
        assert shard == list(range(rank, 20, 2))
    assert len(set(seen)) == 16


# ---- mixup, preparation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixup", "cutmix", "minmax", "kinds"),
    [
        (0.8, 0, [], {"mixup"}),
        (0, 1, [], {"cutmix"}),
        (0, 0, [0.2, 0.4], {"cutmix"}),
        (0.8, 1, [], {"mixup", "cutmix"}),
    ],
)
def test_mixup_and_cutmix(mixup, cutmix, minmax, kinds):
    mix = build_mixup(config("AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix, "AUG.CUTMIX_MINMAX", minmax))
    np.random.seed(0)
    found = set()
    for _ in range(20):
        images = torch.zeros(2, 3, 16, 16)
        images[1] = 1
        images, targets = mix(images, torch.tensor([3, 5]))
        share = images[0].mean().item()  # of the second image in the first
        expected = torch.full((10,), 0.1 / 10)
        expected[3] += 0.9 * (1 - share)
        expected[5] += 0.9 * share
        torch.testing.assert_close(targets[0], expected)
        if 0.001 < share < 0.999:
            found.add("cutmix" if set(images[0].unique().tolist()) == {0.0, 1.0} else "mixup")
    assert found == kinds


def test_mixup_takes_every_option():
    options = config("AUG.MIXUP", 0.8, "AUG.CUTMIX", 1.0, "AUG.MIXUP_PROB", 0.3, "AUG.MIXUP_SWITCH_PROB", 0.2,
                     "AUG.MIXUP_MODE", "elem")
    mix = build_mixup(options)
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.cutmix_minmax) == (0.8, 1.0, None)
    assert (mix.mix_prob, mix.switch_prob, mix.mode) == (0.3, 0.2, "elem")
    assert (mix.label_smoothing, mix.num_classes) == (0.1, 10)
    assert build_mixup(config("AUG.MIXUP", 0.8, "MODEL.LABEL_SMOOTHING", 0.25)).label_smoothing == 0.25


def test_odd_batches_cannot_be_mixed():
    with pytest.raises(ValueError, match="DATA.BATCH_SIZE is 7; it must be even while mixup or cutmix is on"):
        build_mixup(load_config("", ["MODEL.NAME", "x", "DATA.BATCH_SIZE", 7, "AUG.MIXUP", 0]))


def test_no_mixup():
    assert build_mixup(config("AUG.MIXUP", 0, "AUG.CUTMIX", 0)) is None


def test_prepare_data_downloads_cifar_only(tmp_path, monkeypatch):
    def download(*args, **options):
        raise OSError("asked")

    for name in ("cifar10", "cifar100"):
        monkeypatch.setattr(cifar, "download_and_extract_archive", download)
        with pytest.raises(FileNotFoundError, match=f"{name} could not be downloaded from .*asked"):
            prepare_data(config("DATA.DATASET", name, "DATA.DATA_PATH", tmp_path))
        with pytest.raises(ValueError, match=r"DATA\.DATA_PATH is empty"):
            prepare_data(config("DATA.DATASET", name))
    prepare_data(config())
    prepare_data(config("DATA.DATASET", "imagenet", "DATA.DATA_PATH", tmp_path))


# ---- the package ---------------------------------------------------------------------------------


def test_loaders_can_be_sent_to_spawned_workers():
    for loader in (build_train_loader(config()), build_val_loader(config())):
        assert len(pickle.loads(pickle.dumps(loader.dataset))) == len(loader.dataset)


def test_the_package_imports_neither_scikit_learn_nor_the_top_level():
    root = Path(__file__).parents[2]
    left_out = {"sklearn", "config", "distributed", "engine", "main"}
    code = f"import sys, data; print(*{left_out} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
