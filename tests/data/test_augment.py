"""The policies' draws against timm's own, and the operations of workers and devices against timm's on PIL images."""

import collections
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from config import load_config
from data import augment, augment_batch
from data.augment import FILL, Augmentation, Draw, Rectangle, Step, draw_crop, draw_erasing, image_generator

RANGES = {
    "Rotate": (-30, 30), "Posterize": (1, 8), "Solarize": (0, 256), "SolarizeAdd": (0, 128), "Color": (0, 1.9),
    "Contrast": (0.1, 1.9), "Brightness": (0.1, 1.9), "Sharpness": (0.1, 1.9), "ShearX": (-0.3, 0.3),
    "ShearY": (-0.3, 0.3), "TranslateX": (-15, 15), "TranslateY": (-15, 15), "GaussianBlur": (0.1, 2),
}
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
EXACT = ("Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")


def augmentation(name, *opts) -> Augmentation:
    return Augmentation(load_config(opts=["AUG.AUTO_AUGMENT", name, "DATA.IMG_SIZE", "64", *map(str, opts)]))


def draws(chosen: Augmentation, count: int) -> list[Draw]:
    return [chosen.draw(0, index, 64, 64) for index in range(count)]


def images(size: int, rng) -> np.ndarray:
    """Noise, smooth pictures and flat ones: uint8 (6, size, size, 3)."""
    noise = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(2)]
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)) for _ in range(2)]
    smooth = [np.asarray(image.resize((size, size), Resampling.BICUBIC)) for image in coarse]
    flat = [np.full((size, size, 3), value, np.uint8) for value in (0, 77)]
    return np.stack(noise + smooth + flat)


def values(name, count, rng) -> list[float]:
    found = rng.uniform(*RANGES.get(name, (0, 0)), count)
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        found = found.round()
    return [float(np.float32(value)) for value in found]


def on_device(pixels: np.ndarray, steps: list[list[Step]]) -> np.ndarray:
    tensor = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
    return augment_batch.run(tensor, steps).permute(0, 2, 3, 1).numpy()


# ---- operations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bicubic", [True, False])
@pytest.mark.parametrize("size", [64, 33])
@pytest.mark.parametrize("name", augment_batch._OPERATIONS)
def test_operations_on_the_device_agree_with_timm(name, size, bicubic):
    """A worker runs timm's. Exactly or within 1 level; by 1 level in less than 1 pixel of 100."""
    rng = np.random.default_rng(0)
    for _ in range(2):
        pixels = images(size, rng)
        steps = [[Step(name, value, bicubic)] for value in values(name, len(pixels), rng)]
        pictures = [Image.fromarray(image) for image in pixels]
        timm = np.stack([augment._run(*pair) for pair in zip(pictures, steps, strict=True)]).astype(int)
        difference = np.abs(on_device(pixels, steps) - timm)
        assert difference.max() <= (0 if name in EXACT else 1)
        assert (difference > 0).mean() < 0.01


def test_posterizing_to_no_bits_gives_black():
    pixels = images(16, np.random.default_rng(0))
    assert not on_device(pixels, [[Step("Posterize", 0)]] * len(pixels)).any()
    assert not np.asarray(augment._run(Image.fromarray(pixels[0]), [Step("Posterize", 0)])).any()


def test_a_shift_beyond_the_image_leaves_the_fill():
    pixels = images(16, np.random.default_rng(0))
    for step in (Step("TranslateX", 99.5), Step("TranslateY", -40)):
        assert (on_device(pixels, [[step]] * len(pixels)) == FILL).all()
        assert (np.asarray(augment._run(Image.fromarray(pixels[0]), [step])) == FILL).all()


def test_each_image_of_a_batch_gets_its_own_steps():
    """A batch with everything mixed is the same as its images one by one."""
    rng, draw = np.random.default_rng(0), random.Random(0)
    names = ["None", *augment_batch._OPERATIONS]
    pixels = np.concatenate([images(33, rng) for _ in range(8)])
    steps = []
    for _ in pixels:
        chosen = [draw.choice(names) for _ in range(draw.randint(0, 3))]
        steps.append([Step(name, values(name, 1, rng)[0], draw.random() < 0.5) for name in chosen])
    together = on_device(pixels, steps)
    alone = np.concatenate([on_device(pixels[i : i + 1], steps[i : i + 1]) for i in range(len(pixels))])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("name", ["augmix-m5-w3", "augmix-m3-w4-d2-b1", "rand-m9-mstd0.5-inc1", "3a"])
def test_worker_and_device_make_the_same_images(name):
    """The same draws give the same pictures but for roundings: 99 pixels of 100 within 2 levels."""
    chosen = augmentation(name)
    pixels = np.concatenate([images(64, np.random.default_rng(seed)) for seed in range(4)])
    found = draws(chosen, len(pixels))
    worker = np.stack([augment.augment(Image.fromarray(image), draw)
                       for image, draw in zip(pixels, found, strict=True)]).astype(int)
    device = augment_batch.augment(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2), found)
    assert (np.abs(worker - device.permute(0, 2, 3, 1).numpy()) <= 2).mean() > 0.99
    assert (worker != pixels).any() and {draw.flip for draw in found} == {True, False}


def test_augmix_is_timms_mixture():
    """With the chains' results known (inversion), timm's formula gives the picture."""
    image = Image.fromarray(images(16, np.random.default_rng(0))[0])
    chains = [(0.4, []), (0.12, [Step("Invert")]), (0.3, []), (0.18, [Step("Posterize", 1)])]
    draw = Draw(Rectangle(0, 0, 16, 16), True, False, chains, [], [])
    pixels = np.asarray(image, np.float32)
    mixed = 0.2 * (255 - pixels) + 0.5 * pixels + 0.3 * np.asarray(auto_augment.posterize(image, 1), np.float32)
    expected = 0.4 * pixels + 0.6 * mixed
    assert np.abs(np.asarray(augment.augment(image, draw)) - expected).max() <= 0.51


# ---- draws ---------------------------------------------------------------------------------------


class Record:
    """timm's operations replaced by notes of their names and values; each value as our draws have it."""

    def __init__(self, monkeypatch, size=64):
        self.notes = []
        for name in auto_augment.NAME_TO_OP:
            monkeypatch.setitem(auto_augment.NAME_TO_OP, name, self.note(name, size))

    def note(self, name, size):
        def operation(image, *values, fillcolor, resample):
            value = values[0] if values else 0.0
            ours = name.removesuffix("Increasing").removesuffix("Original").removesuffix("Rel")
            if name.endswith("Rel"):
                value = value * size
            if name == "Desaturate":
                ours, value = "Color", 1 - value
            self.notes.append((ours, float(value), resample))
            return image

        return operation


@pytest.mark.parametrize("name, interpolation, count", [
    ("rand-m9-mstd0.5-inc1", "bicubic", 10_000), ("rand-m9-mstd0.5-inc1", "random", 2_000),
    pytest.param("rand-m9-mstd0.5-inc1", "bicubic", 100_000, marks=pytest.mark.slow),
    ("rand-m5-n3-p0.7", "bicubic", 2_000), ("rand-m15-mmax20-mstd101-inc1", "bicubic", 2_000),
    ("rand-mstd1-tweights", "bicubic", 2_000), ("rand-m6-t3aw-inc1", "bicubic", 2_000), ("v0", "bicubic", 2_000),
    ("original-mstd0.5", "bicubic", 2_000), ("v0r", "bicubic", 2_000), ("originalr", "bicubic", 2_000),
])
def test_draws_have_timms_distribution(name, interpolation, count, monkeypatch):
    """The names of the operations and, for each, the distribution of its values."""
    chosen = augmentation(name, "DATA.INTERPOLATION", interpolation, "AUG.COLOR_JITTER", 0)
    record = Record(monkeypatch)
    timm = augment._parse(name, 64, interpolation)  # made anew: its operations are the notes
    random.seed(1)
    np.random.seed(1)
    for _ in range(count):
        timm(None)
    ours = [step for draw in draws(chosen, count) for step in draw.steps if step.operation != "None"]
    assert abs(len(ours) - len(record.notes)) < 5 * math.sqrt(2 * count)
    names = collections.Counter(step.operation for step in ours), collections.Counter(note[0] for note in record.notes)
    for operation in names[0] | names[1]:
        first, second = names[0][operation], names[1][operation]
        assert abs(first - second) < 5 * math.sqrt(first + second), operation
        a = np.array([step.value for step in ours if step.operation == operation])
        b = np.array([note[1] for note in record.notes if note[0] == operation])
        if len(a) > 30 and len(b) > 30:
            distance = kolmogorov_smirnov(a, b)
            assert distance < 2.2 * math.sqrt(1 / len(a) + 1 / len(b)), operation  # p below 1e-4
    sampling = {note[2] for note in record.notes}
    if interpolation == "random":  # timm's operations choose when they are called
        assert sampling == {(Resampling.BILINEAR, Resampling.BICUBIC)}
        assert 0.45 < np.mean([step.bicubic for step in ours]) < 0.55
    else:
        assert sampling == {Resampling.BICUBIC} and all(step.bicubic for step in ours)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.unique(np.concatenate([a, b]).round(9))
    ranks = (np.searchsorted(np.sort(x.round(9)), points, side="right") / len(x) for x in (a, b))
    return np.abs(next(ranks) - next(ranks)).max()


def test_the_draws_use_no_global_generator():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for name in ("rand-m9-mstd0.5-inc1", "augmix-m5", "original", "3a"):
        first, again, other = (augmentation(name).draw(epoch, 5, 64, 64) for epoch in (0, 0, 1))
        assert first == again != other
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_colour_jitter_takes_the_policys_place():
    """timm jitters where there is no policy, and after 3-Augment."""
    for name, others in (("none", 0), ("3a", 1)):
        jitter = [draw.steps[others:] for draw in draws(augmentation(name, "AUG.COLOR_JITTER", 0.3), 300)]
        assert all(sorted(step.operation for step in steps) == ["Brightness", "Color", "Contrast"] for steps in jitter)
        assert len({tuple(step.operation for step in steps) for steps in jitter}) == 6  # in every order
        factors = np.array([step.value for steps in jitter for step in steps])
        assert 0.7 <= factors.min() < 0.71 and 1.29 < factors.max() <= 1.3 and abs(factors.mean() - 1) < 0.02
    assert len(augmentation("rand-m9-mstd0.5-inc1").draw(0, 0, 9, 9).steps) == 2
    assert not augmentation("none", "AUG.COLOR_JITTER", 0).draw(0, 0, 9, 9).steps


def test_a_share_of_the_images_is_flipped():
    flips = [draw.flip for draw in draws(augmentation("none", "AUG.HFLIP", 0.3), 1000)]
    assert 0.25 < np.mean(flips) < 0.35


def test_augmix_weights_are_timms():
    """Dirichlet's times Beta's: uniform for alpha 1, so that mean and variance are known."""
    for name in ("augmix-w3", "augmix-w3-b1"):  # the second is timm's other way to compute the first
        weights = np.array([[weight for weight, _ in draw.chains] for draw in draws(augmentation(name), 5_000)])
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        shares = weights[:, 1:] / (1 - weights[:, :1])
        np.testing.assert_allclose(weights.mean(axis=0), [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.02)
        np.testing.assert_allclose([weights[:, 0].var(), *shares.var(axis=0)], [1 / 12] + [1 / 18] * 3, atol=0.006)


@pytest.mark.parametrize("name", ["rand-z3", "nonsense"])
def test_an_unknown_policy_is_an_error(name):
    with pytest.raises(ValueError, match=f"AUG.AUTO_AUGMENT is '{name}', which timm does not accept"):
        augmentation(name)


# ---- crops and erasing ---------------------------------------------------------------------------


def test_the_generator_is_a_function_of_the_key():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**33), (2**40, 0, 0), (0, 299, 1_281_166)]
    state = random.getstate()
    found = [tuple(image_generator(*key).random() for _ in range(2)) for key in keys]
    assert all(first == second for first, second in found)
    assert len({first for first, _ in found}) == len(keys)
    assert random.getstate() == state


def test_neighbouring_keys_give_unrelated_numbers():
    """First numbers of 20,000 images: uniform, and uncorrelated with those of the next image and the next epoch."""
    first = np.array([[image_generator(0, epoch, index).random() for index in range(10_000)] for epoch in (0, 1)])
    assert np.abs(np.histogram(first, 20, (0, 1))[0] - 1000).max() < 5 * np.sqrt(1000)
    assert abs(np.corrcoef(first[0, :-1], first[0, 1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(first[0], first[1])[0, 1]) < 0.05


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (32, 32), (2000, 90), (90, 2000)])
def test_crops_are_distributed_as_timms(width, height):
    rng, image = random.Random(0), Image.new("RGB", (width, height))
    random.seed(1)
    ours = np.array([draw_crop(rng, width, height, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    get_params = RandomResizedCropAndInterpolation.get_params
    timm = np.array([get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    for column in range(4):
        spread = max(timm[:, column].std(), 1e-9)
        assert abs(ours[:, column].mean() - timm[:, column].mean()) < 5 * spread * np.sqrt(2 / 4000) + 1e-9
        assert abs(ours[:, column].std() - timm[:, column].std()) < 0.06 * spread + 1e-9
    top, left, h, w = ours.T
    assert top.min() >= 0 and left.min() >= 0 and (top + h).max() <= height and (left + w).max() <= width


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_a_crop_of_a_tiny_image_holds_a_pixel(size):
    rng = random.Random(0)
    for _ in range(200):
        top, left, h, w = draw_crop(rng, *size, (0.08, 1), (3 / 4, 4 / 3))
        assert h >= 1 and w >= 1 and top + h <= size[1] and left + w <= size[0]


@pytest.mark.parametrize("most", [1, 3])
def test_erased_areas_are_distributed_as_timms(most):
    rng, count = random.Random(0), 3000
    random.seed(1)
    erase = RandomErasing(0.25, mode="const", max_count=most, device="cpu")
    timm = [int((erase(torch.ones(1, 32, 32)) == 0).sum()) for _ in range(count)]
    ours = []
    for _ in range(count):
        canvas = np.ones((32, 32))
        for (top, left, h, w), seed in draw_erasing(rng, 32, 0.25, most):
            canvas[top : top + h, left : left + w] = 0
            assert 0 <= seed < 2**63
        ours.append(int((canvas == 0).sum()))
    hits = np.count_nonzero(ours), np.count_nonzero(timm)
    assert abs(hits[0] - hits[1]) < 5 * np.sqrt(2 * count * 0.25 * 0.75)
    areas = [np.array(found)[np.array(found) > 0] for found in (ours, timm)]
    assert abs(areas[0].mean() - areas[1].mean()) < 5 * areas[1].std() * np.sqrt(2 / min(hits))


def test_nothing_is_erased_with_probability_0():
    assert not any(draw_erasing(random.Random(seed), 32, 0.0, 1) for seed in range(100))
