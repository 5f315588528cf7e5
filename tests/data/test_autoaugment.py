"""AutoAugment's operations against Pillow's, on photographs."""

import collections
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
import skimage.data

from convstem_jax.data import autoaugment

WARP = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}


def affine(*rows):
    return lambda x, v: x.transform(
        x.size, Image.Transform.AFFINE, [f(v, x.size[1]) for f in rows], **WARP
    )


ZERO, ONE = (lambda v, h: 0), (lambda v, h: 1)
PILLOW = {
    "auto_contrast": lambda x, v: ImageOps.autocontrast(x),
    "equalize": lambda x, v: ImageOps.equalize(x),
    "invert": lambda x, v: ImageOps.invert(x),
    "posterize": lambda x, v: ImageOps.posterize(x, max(1, int(v))),
    "solarize": lambda x, v: ImageOps.solarize(x, int(v)),
    "solarize_add": lambda x, v: x.point(lambda i: min(255, v + i) if i < 128 else i),
    "color": lambda x, v: ImageEnhance.Color(x).enhance(v),
    "rotate": lambda x, v: x.rotate(v, **WARP),
    "shear_x": affine(ONE, lambda v, h: v, ZERO, ZERO, ONE, ZERO),
    "shear_y": affine(ONE, ZERO, ZERO, lambda v, h: v, ONE, ZERO),
    "translate_y": affine(ONE, ZERO, ZERO, ZERO, ONE, lambda v, h: v * h),
}
# What the policy's code says of each operation's range.
RANGES = {
    "posterize": (0, 4), "solarize": (0, 256), "solarize_add": (0, 110), "color": (0.1, 1.9),
    "rotate": (0, 30), "shear_x": (0, 0.3), "shear_y": (0, 0.3), "translate_y": (0, 0.45),
}  # fmt: skip
# "v0", as published: operation, probability, magnitude of 10.
POLICY = """
Equalize 0.8 1, ShearY 0.8 4 | Color 0.4 9, Equalize 0.6 3 | Color 0.4 1, Rotate 0.6 8
Solarize 0.8 3, Equalize 0.4 7 | Solarize 0.4 2, Solarize 0.6 2 | Color 0.2 0, Equalize 0.8 8
Equalize 0.4 8, SolarizeAdd 0.8 3 | ShearX 0.2 9, Rotate 0.6 8 | Color 0.6 1, Equalize 1.0 2
Invert 0.4 9, Rotate 0.6 0 | Equalize 1.0 9, ShearY 0.6 3 | Color 0.4 7, Equalize 0.6 0
Posterize 0.4 6, AutoContrast 0.4 7 | Solarize 0.6 8, Color 0.6 9 | Solarize 0.2 4, Rotate 0.8 9
Rotate 1.0 7, TranslateY 0.8 9 | ShearX 0.0 0, Solarize 0.8 4 | ShearY 0.8 0, Color 0.6 4
Color 1.0 0, Rotate 0.6 2 | Equalize 0.8 4, Equalize 0.0 8 | Equalize 1.0 4, AutoContrast 0.6 2
ShearY 0.4 7, SolarizeAdd 0.6 7 | Posterize 0.8 2, Solarize 0.6 10 | Solarize 0.6 8, Equalize 0.6 1
Color 0.8 6, Rotate 0.4 5
"""
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_y")


@pytest.fixture(scope="module")
def photographs():
    crops = [
        skimage.data.astronaut()[:224, 100:324],
        skimage.data.chelsea()[40:240, 80:304],
        skimage.data.coffee()[50:274, 100:300],
    ]
    return [np.ascontiguousarray(crop) for crop in crops]


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("negate", [False, True])
def test_operation_is_pillows(photographs, name, negate):
    low, high = RANGES.get(name, (0, 0))
    flat = np.full((20, 30, 3), 77, np.uint8)  # where there is nothing to stretch
    for image in photographs if name in GEOMETRY else [*photographs, flat]:
        for magnitude in (0.0, 0.1, 0.2, 0.3, 0.6, 0.8, 0.9, 1.0):
            value = low + magnitude * (high - low)
            if negate and name in GEOMETRY:
                value = -value
            expected = np.asarray(PILLOW[name](Image.fromarray(image), value)).astype(int)
            got = autoaugment.apply(name, image, magnitude, negate=negate)
            assert got.dtype == np.uint8 and got.shape == image.shape
            error = np.abs(got - expected)
            if name not in GEOMETRY:
                assert error.max() == 0, f"magnitude {magnitude}"
                continue
            # Pillow cuts off the fraction of a level, OpenCV rounds and takes 32 steps between two
            # pixels; and they differ at the edge of the grey fill.
            assert (error > 1).mean() < 0.01, f"magnitude {magnitude}"
            if magnitude > 0:
                assert np.abs(got.astype(int) - image).mean() > 3, "the operation does nothing"


def test_the_policy_is_the_published_one():
    published = [
        tuple(
            (re.sub("(?<!^)([A-Z])", r"_\1", name).lower(), float(probability), int(level) / 10)
            for name, probability, level in map(str.split, pair.split(","))
        )
        for pair in POLICY.strip().replace("\n", "|").split("|")
    ]
    assert tuple(published) == autoaugment.POLICY


def test_policy_is_drawn_uniformly_with_its_probabilities(monkeypatch):
    """Each operation is applied as often as the policy says."""
    counts, negated = collections.Counter(), []

    def count(name, image, magnitude, negate):
        counts[name, magnitude] += 1
        negated.append(negate)
        return image

    monkeypatch.setattr(autoaugment, "apply", count)
    rng, num = np.random.default_rng(0), 50_000
    for _ in range(num):
        autoaugment.auto_augment(np.zeros((2, 2, 3), np.uint8), rng)
    expected = collections.Counter()
    for pair in autoaugment.POLICY:
        for name, probability, magnitude in pair:
            expected[name, magnitude] += probability / 25
    for key in expected:
        assert counts[key] / num == pytest.approx(expected[key], abs=0.004), key
    assert np.mean(negated) == pytest.approx(0.5, abs=0.01)


def test_posterize_leaves_a_bit():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    got = autoaugment.apply("posterize", image, 0.2, negate=False)  # 0.8 bits
    assert set(np.unique(got)) == {0, 128}
