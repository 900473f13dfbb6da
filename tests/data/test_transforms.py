"""What a data worker makes of an image, in training and in evaluation."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from config import load_config
from data.augment import Augmentation, Rectangle
from data.images import ImageError, ImageSet
from data.transforms import NO_LABEL, EvalSet, TrainSet, build_transform, resized_crop

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def config(*opts):
    return load_config(opts=[str(value) for value in opts])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def unnormalised(tensor: torch.Tensor) -> np.ndarray:
    """(3, S, S) back to uint8 (S, S, 3)."""
    return np.rint((tensor.numpy().transpose(1, 2, 0) * STD + MEAN) * 255).astype(np.uint8)


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (32, 36), (16, 18), (384, 438)])
def test_evaluation_crops_the_centre_at_256_over_224(size, shorter):
    image = noise(2 * shorter, shorter)  # already of that size, so that no pixel is interpolated
    found = unnormalised(build_transform(config("DATA.IMG_SIZE", size))(image))
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
    found = build_transform(options)(noise(50, 40))
    assert found.shape == (3, 32, 32) and found.dtype == torch.float32
    np.testing.assert_array_equal(unnormalised(found), np.asarray(noise(50, 40).resize((32, 32), resample)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (8, 8), (500, 375)])
@pytest.mark.parametrize("size", [16, 32, 224])
def test_every_image_size_gives_the_input_size(shape, size):
    options = config("DATA.IMG_SIZE", size)
    found = build_transform(options)(noise(*shape))
    assert found.shape == (3, size, size) and found.isfinite().all()
    pixels = TrainSet(Images(noise(*shape)), Augmentation(options))[0, 0].pixels
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8


def test_evaluation_is_torchvisions_on_pil_images():
    """The paper's figures were made so: Pillow's bicubic resize of the shorter side, the centre of that."""
    plain = transforms.Compose([
        transforms.Resize(256, InterpolationMode.BICUBIC), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
    for shape in ((500, 375), (333, 500), (100, 90)):
        image = noise(*shape)
        assert torch.equal(build_transform(config())(image), plain(image))
        pixels = EvalSet(Images(image), config())[0].pixels
        np.testing.assert_array_equal(pixels, unnormalised(plain(image)))


def test_an_image_too_narrow_to_resize_is_named():
    """1 x 60000 pixels would be 256 x 15,360,000: over 17 GB."""
    with pytest.raises(ImageError, match="an image of 1x60000 pixels would have 3.9e.09 once resized to a sh"):
        build_transform(config())(Image.new("RGB", (1, 60000)))
    with pytest.raises(ImageError, match="narrow.png: an image of 60000x1 pixels"):
        EvalSet(Images(Image.new("RGB", (60000, 1))), config())[0]
    assert build_transform(config("TEST.CROP", False))(Image.new("RGB", (1, 60000))).shape == (3, 224, 224)


@pytest.mark.parametrize("bicubic", [True, False])
def test_resized_crops_agree_with_pillow(bicubic):
    """Within 1 level but for one pixel of 1,000, on something like a photograph."""
    sampling = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), sampling)
    pixels = np.asarray(coarse, np.int16) + rng.integers(-20, 21, (375, 500, 3), dtype=np.int16)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for crop in (Rectangle(0, 0, 375, 500), Rectangle(40, 50, 300, 250), Rectangle(100, 7, 90, 120)):
        found = resized_crop(np.asarray(image), crop, 224, bicubic).astype(int)
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        expected = np.asarray(image.crop(box).resize((224, 224), sampling))
        difference = np.abs(found - expected)
        assert (difference <= 1).mean() > 0.999 and difference.max() <= 4 and difference.mean() < 0.4


def test_without_augmentation_training_shows_the_image_itself():
    options = config(
        "AUG.SCALE", "[1, 1]", "AUG.RATIO", "[1, 1]", "AUG.HFLIP", 0, "AUG.AUTO_AUGMENT", "none",
        "AUG.COLOR_JITTER", 0, "AUG.REPROB", 0, "DATA.IMG_SIZE", 32,
    )
    sample = TrainSet(Images(noise(32, 32)), Augmentation(options))[0, 0]
    np.testing.assert_array_equal(sample.pixels, np.asarray(noise(32, 32)))
    assert not sample.draw.erased


def test_draws_follow_the_config():
    options = config("AUG.SCALE", "[0.5, 0.6]", "AUG.RATIO", "[0.9, 1.1]", "AUG.REPROB", 1.0, "AUG.RECOUNT", 3,
                     "DATA.INTERPOLATION", "random", "AUG.AUTO_AUGMENT", "none")
    draws = [Augmentation(options).draw(0, index, 100, 100) for index in range(200)]
    crops = np.array([draw.crop for draw in draws])
    areas, ratios = crops[:, 2] * crops[:, 3] / 1e4, crops[:, 3] / crops[:, 2]
    assert 0.48 < areas.min() < 0.51 and 0.59 < areas.max() < 0.62
    assert 0.88 < ratios.min() < 0.92 and 1.08 < ratios.max() < 1.13
    assert 0.4 < np.mean([draw.bicubic for draw in draws]) < 0.6
    assert {len(draw.erased) for draw in draws} == {1, 2, 3}
    assert all(Augmentation(config()).draw(0, index, 9, 9).bicubic for index in range(9))


def test_randaugment_works_at_the_ends_of_its_range():
    for policy in ("rand-m10-inc1", "rand-m0", "original-mstd0.5"):
        for on_device in (False, True):
            dataset = TrainSet(Images(noise(16, 16)), Augmentation(config("AUG.AUTO_AUGMENT", policy)), on_device)
            for epoch in range(40):
                assert dataset[epoch, 0].pixels.shape == (224, 224, 3)


class Images(ImageSet):
    """A data set of copies of one image."""

    classes, labels = ["a", "b"], [0, 1]

    def __init__(self, image):
        self.image = image

    def pixels(self, index):
        return np.asarray(self.image), index

    def name(self, index):
        return "narrow.png"


@pytest.mark.parametrize("on_device", [False, True])
def test_train_set_augments_by_seed_epoch_and_index(on_device):
    def dataset(seed):
        return TrainSet(Images(noise(20, 20)), Augmentation(config("DATA.IMG_SIZE", 16, "SEED", seed)), on_device)

    def same(first, second):
        return np.array_equal(first.pixels, second.pixels) and first[1:] == second[1:]

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = dataset(4)[3, 1]
    assert len(dataset(4)) == 2 and found.label == 1
    assert same(found, dataset(4)[3, 1])
    others = [dataset(4)[4, 1], dataset(4)[3, 0], dataset(5)[3, 1]]
    assert not any(np.array_equal(found.pixels, other.pixels) for other in others)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


class Bad(Images):
    def pixels(self, index):
        raise ImageError("bad.png cannot be decoded")


def test_an_image_that_cannot_be_read_is_named_with_the_option_that_skips_it():
    for dataset, key in ((TrainSet(Bad(None), Augmentation(config())), (0, 0)), (EvalSet(Bad(None), config()), 0)):
        with pytest.raises(ImageError, match="^bad.png cannot be decoded; .*--opts DATA.SKIP_BAD_IMAGES True$"):
            dataset[key]
    sample = EvalSet(Bad(None), config("DATA.SKIP_BAD_IMAGES", True))[0]
    assert sample.label == NO_LABEL and sample.errors == ["bad.png cannot be decoded"]
    assert sample.pixels.shape == (224, 224, 3) and not sample.pixels.any()
