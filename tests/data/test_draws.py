"""The random part of an image: by seed, epoch and index alone, and distributed as timm's."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from data.draws import draw_crop, draw_erasing, image_generator


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
