import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import InterpolationMode

from config import load_config
from data.transforms import EvalSet, TrainSet, build_transform, seeded

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def config(*opts):
    return load_config(opts=[str(value) for value in opts])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def unnormalised(tensor: torch.Tensor) -> np.ndarray:
    """(3, S, S) back to uint8 (S, S, 3)."""
    return np.rint((tensor.numpy().transpose(1, 2, 0) * STD + MEAN) * 255).astype(np.uint8)


def steps(config) -> list:
    return [type(step).__name__ for step in build_transform(config, train=True).transforms]


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (32, 36), (16, 18), (384, 438)])
def test_evaluation_crops_the_centre_at_256_over_224(size, shorter):
    image = noise(2 * shorter, shorter)  # already of that size, so that no pixel is interpolated
    found = unnormalised(build_transform(config("DATA.IMG_SIZE", size), train=False)(image))
    left, top = round((2 * shorter - size) / 2), round((shorter - size) / 2)
    np.testing.assert_array_equal(found, np.asarray(image)[top : top + size, left : left + size])


@pytest.mark.parametrize(
    ("name", "resample"),
    [
        ("bicubic", Image.Resampling.BICUBIC),
        ("bilinear", Image.Resampling.BILINEAR),
        ("random", Image.Resampling.BICUBIC),
    ],
)
def test_evaluation_without_crop_squeezes_the_whole_image(name, resample):
    options = config("TEST.CROP", False, "DATA.IMG_SIZE", 32, "DATA.INTERPOLATION", name)
    found = build_transform(options, train=False)(noise(50, 40))
    assert found.shape == (3, 32, 32) and found.dtype == torch.float32
    np.testing.assert_array_equal(unnormalised(found), np.asarray(noise(50, 40).resize((32, 32), resample)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (8, 8), (500, 375)])
@pytest.mark.parametrize("size", [16, 32, 224])
@pytest.mark.parametrize("train", [False, True])
def test_every_image_size_gives_the_input_size(shape, size, train):
    with seeded(0):
        found = build_transform(config("DATA.IMG_SIZE", size), train)(noise(*shape))
    assert found.shape == (3, size, size) and found.isfinite().all()


def test_training_steps_follow_the_config():
    assert steps(config()) == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor", "Normalize",
        "RandomErasing",
    ]  # fmt: skip
    assert build_transform(config(), train=True).transforms[0].interpolation == InterpolationMode.BICUBIC
    plain = config("AUG.AUTO_AUGMENT", "none", "AUG.HFLIP", 0, "AUG.REPROB", 0)
    assert steps(plain) == ["RandomResizedCropAndInterpolation", "ColorJitter", "MaybeToTensor", "Normalize"]
    assert "ColorJitter" not in steps(config("AUG.AUTO_AUGMENT", "none", "AUG.COLOR_JITTER", 0))


def test_training_parameters_follow_the_config():
    options = config(
        "AUG.SCALE", "[0.5, 0.6]", "AUG.RATIO", "[0.9, 1.1]", "AUG.HFLIP", 0.3, "AUG.AUTO_AUGMENT", "none",
        "AUG.COLOR_JITTER", 0.2, "AUG.REPROB", 0.7, "AUG.REMODE", "rand", "AUG.RECOUNT", 3,
        "DATA.INTERPOLATION", "bilinear",
    )  # fmt: skip
    crop, flip, jitter, _, normalize, erasing = build_transform(options, train=True).transforms
    assert tuple(crop.scale) == (0.5, 0.6) and tuple(crop.ratio) == (0.9, 1.1) and crop.size == (224, 224)
    assert crop.interpolation == InterpolationMode.BILINEAR
    assert flip.p == 0.3 and tuple(jitter.brightness) == (0.8, 1.2)
    assert (erasing.probability, erasing.mode, erasing.max_count) == (0.7, "rand", 3)
    np.testing.assert_allclose(normalize.mean, MEAN)
    np.testing.assert_allclose(normalize.std, STD)


def test_without_augmentation_training_only_normalises():
    options = config(
        "AUG.SCALE", "[1, 1]", "AUG.RATIO", "[1, 1]", "AUG.HFLIP", 0, "AUG.AUTO_AUGMENT", "none",
        "AUG.COLOR_JITTER", 0, "AUG.REPROB", 0, "DATA.IMG_SIZE", 32,
    )  # fmt: skip
    found = build_transform(options, train=True)(noise(32, 32))
    np.testing.assert_array_equal(unnormalised(found), np.asarray(noise(32, 32)))


@pytest.mark.parametrize("policy", ["rand-z3", "nonsense"])
def test_an_unknown_policy_is_an_error(policy):
    with pytest.raises(ValueError, match=f"AUG.AUTO_AUGMENT is '{policy}', which timm does not understand"):
        build_transform(config("AUG.AUTO_AUGMENT", policy), train=True)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "original-mstd0.5"])
def test_randaugment_works_at_the_ends_of_its_range(policy):
    transform = build_transform(config("AUG.AUTO_AUGMENT", policy, "DATA.IMG_SIZE", 16), train=True)
    for index in range(200):
        with seeded(index):
            assert transform(noise(16, 16)).isfinite().all()


def test_posterize_keeps_the_highest_bits():
    image = noise(16, 16)
    for bits in range(9):
        found = auto_augment.NAME_TO_OP["PosterizeIncreasing"](image, bits)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image) & (256 - 2 ** (8 - bits)))


def seed_all():
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeded_draws_are_a_function_of_the_key():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**33), (2**40, 0, 0)]
    found = []
    for key in keys:
        with seeded(*key):
            found.append(draws())
        draws()
        with seeded(*key):
            assert draws() == found[-1]
    assert all(len(set(column)) == len(keys) for column in zip(*found, strict=True))


def test_seeded_leaves_the_generators_as_they_were():
    seed_all()
    expected = draws()
    seed_all()
    with pytest.raises(ZeroDivisionError), seeded(5):
        draws()
        raise ZeroDivisionError
    assert draws() == expected


class Images:
    classes = ["a", "b"]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return noise(20, 20), index


def test_train_set_augments_by_epoch_and_index():
    transform = build_transform(config("DATA.IMG_SIZE", 16), train=True)
    dataset = TrainSet(Images(), transform, seed=4)
    assert len(dataset) == 2 and dataset.classes == ["a", "b"] and dataset[0, 1][1] == 1
    assert torch.equal(dataset[3, 1][0], dataset[3, 1][0])
    others = [dataset[4, 1][0], dataset[3, 0][0], TrainSet(Images(), transform, seed=5)[3, 1][0]]
    assert not any(torch.equal(dataset[3, 1][0], other) for other in others)


def test_eval_set_transforms_by_index():
    dataset = EvalSet(Images(), build_transform(config("DATA.IMG_SIZE", 16), train=False))
    image, label = dataset[1]
    assert image.shape == (3, 16, 16) and label == 1 and len(dataset) == 2 and dataset.classes == ["a", "b"]
