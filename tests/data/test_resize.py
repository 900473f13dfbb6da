"""Crop and resize by matrix products against Pillow's, bit for bit."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

from data.augment import draw_crop
from data.augment_batch import resize_crops


def pillow(image, crop, size, bicubic):
    top, left, h, w = crop
    part = Image.fromarray(np.ascontiguousarray(image[top : top + h, left : left + w]))
    return np.asarray(part.resize((size, size), Resampling.BICUBIC if bicubic else Resampling.BILINEAR))


@pytest.mark.parametrize("bicubic", [True, False])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 224), (32, 32, 32), (8, 8, 16), (20, 31, 48)])
def test_random_crops_are_pillows_to_the_bit(height, width, size, bicubic):
    rng, draw, count = np.random.default_rng(0), random.Random(0), 40
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[::4] = rng.choice([0, 255], images[::4].shape)  # overshoots, which are cut
    crops = [draw_crop(draw, width, height, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(count)]
    found = resize_crops(torch.from_numpy(images), torch.tensor(crops), size, torch.full((count,), bicubic)).numpy()
    expected = np.stack([pillow(image, crop, size, bicubic) for image, crop in zip(images, crops, strict=True)])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("side", [24, 25, 33, 57])
def test_shrinking_along_one_axis_is_pillows_to_the_bit(side):
    image = np.random.default_rng(0).integers(0, 256, (57, 57, 3), dtype=np.uint8)
    for crop in ((3, 0, 24, side), (0, 2, side, 24)):
        found = resize_crops(torch.from_numpy(image[None]), torch.tensor([crop]), 24, torch.tensor([True]))[0].numpy()
        np.testing.assert_array_equal(found, pillow(image, crop, 24, True))


def test_a_window_is_a_part_of_the_whole():
    image = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = torch.tensor([[0, 0, 32, 32]]).expand(2, 4)
    bicubic = torch.tensor([True, False])
    whole = resize_crops(image, crops, 256, bicubic)
    assert torch.equal(resize_crops(image, crops, 256, bicubic, (16, 240)), whole[:, 16:240, 16:240])
