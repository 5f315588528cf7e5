"""Crops and flips: how they are drawn, and which pixels they take."""

from unittest import mock

import cv2
import numpy as np
import pytest

from convstem_jax.data import augment


def test_random_resized_crop_draws_areas_and_ratios_of_the_paper():
    rng = np.random.default_rng(0)
    # The pixel's value is its position, so that the crop's corners can be read off.
    y, x = np.mgrid[:240, :240].astype(np.float32)
    image = np.stack([y, x, y], axis=-1)
    areas, ratios = [], []
    for _ in range(2000):
        crop = augment.random_resized_crop(image, rng, size=64, min_area=0.08)
        h = (crop[-1, 0, 0] - crop[0, 0, 0]) * 64 / 63
        w = (crop[0, -1, 1] - crop[0, 0, 1]) * 64 / 63
        areas.append(h * w / 240**2)
        ratios.append(w / h)
    assert 0.07 < min(areas) < 0.1 and 0.85 < max(areas) <= 1.02
    assert 0.73 < min(ratios) < 0.77 and 1.3 < max(ratios) < 1.36
    # Inverted in half of the cases: otherwise the ratios would be uniform and their mean above 1.
    assert abs(np.mean(np.log(ratios))) < 0.02


def test_flip_mirrors_half_of_the_images():
    rng = np.random.default_rng(0)
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    flipped = [augment.random_flip(image, rng) for _ in range(1000)]
    mirrored = sum((f == image[:, ::-1]).all() for f in flipped)
    assert 450 < mirrored < 550
    assert all((f == image).all() or (f == image[:, ::-1]).all() for f in flipped)


@pytest.mark.parametrize(
    "shape, resized_size",  # height, width; width, height of the short side 256
    [
        ((300, 500), (426, 256)),
        ((500, 300), (256, 426)),
        ((256, 256), (256, 256)),
        ((100, 90), (256, 284)),
        ((103, 206), (512, 256)),
    ],
)
def test_center_crop_is_the_middle_of_the_resized_image(shape, resized_size):
    h, w = shape
    image = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    crop = augment.center_crop(image, resize=256, size=224)
    assert crop.shape == (224, 224, 3)
    resized = cv2.resize(image, resized_size)
    top, left = -(-(resized.shape[0] - 224) // 2), -(-(resized.shape[1] - 224) // 2)
    assert (crop == resized[top : top + 224, left : left + 224]).all()


def test_of_a_strip_only_the_middle_is_resized(monkeypatch):
    resize = mock.Mock(wraps=cv2.resize)  # which readers of other tests may be calling too
    monkeypatch.setattr(cv2, "resize", resize)
    strip = np.tile((np.arange(20_000) // 80).astype(np.uint8)[None, :, None], 3)
    for image in (strip, strip.transpose(1, 0, 2)):
        crop = augment.center_crop(image, resize=256, size=224).astype(int)
        assert np.abs(crop - 125).max() <= 1, "it is not the middle"
    wide = np.zeros((10, 160, 3), np.uint8)
    augment.center_crop(wide, resize=256, size=224)
    sizes = {call.args[0].shape: call.args[1] for call in resize.call_args_list}
    assert sizes[1, 16, 3] == sizes[wide.shape] == (16 * 256, 256)
    assert sizes[16, 1, 3] == (256, 16 * 256) and strip.shape not in sizes
