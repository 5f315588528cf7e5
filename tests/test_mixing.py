"""Mixup, CutMix and lighting against plain NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from convstem_jax import mixing

H, W = 24, 32


def masks(num, mixup_alpha, cutmix_alpha):
    def draw(key):
        return mixing.draw_mask(key, H, W, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)

    return np.array(jax.vmap(draw)(jax.random.split(jax.random.key(0), num)))


def reference(images, targets, mask):
    """Mixes each image with its neighbour, one by one."""
    images, targets = np.array(images, np.float64), np.array(targets, np.float64)
    mixed_images, mixed_targets = images.copy(), targets.copy()
    share = mask.mean(dtype=np.float64)
    for i in range(len(images)):
        j = i + 1 if i % 2 == 0 else i - 1
        mixed_targets[i] = share * targets[i] + (1 - share) * targets[j]
        for y in range(H):
            for x in range(W):
                m = float(mask[y, x])
                mixed_images[i, y, x] = m * images[i, y, x] + (1 - m) * images[j, y, x]
    return mixed_images, mixed_targets


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_mix_is_the_plain_loop_and_conserves_label_mass(alphas):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, H, W, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(10), size=6).astype(np.float32)
    for mask in masks(5, *alphas):
        got = jax.jit(mixing.mix)(images, targets, mask)
        for g, expected in zip(got, reference(images, targets, mask), strict=True):
            np.testing.assert_allclose(g, expected, atol=1e-5)
        np.testing.assert_allclose(got[1].sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(got[1].sum(axis=0), targets.sum(axis=0), atol=1e-5)


def test_mixup_draws_from_the_beta_distribution():
    drawn = masks(4000, 0.8, 0.0)
    assert (drawn == drawn[:, :1, :1]).all(), "mixup treats all pixels alike"
    shares = drawn[:, 0, 0]
    expected = np.random.default_rng(0).beta(0.8, 0.8, size=100_000)
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(shares, quantiles), np.quantile(expected, quantiles), atol=0.04
    )


def authors_box_share(rng):
    """Share of pixels outside the box, as the authors' code draws it."""
    side = np.sqrt(1 - rng.beta(1.0, 1.0))
    w, h = int(W * side), int(H * side)
    x, y = rng.integers(W), rng.integers(H)
    x0, x1 = np.clip([x - w // 2, x + w // 2], 0, W)
    y0, y1 = np.clip([y - h // 2, y + h // 2], 0, H)
    return 1 - (x1 - x0) * (y1 - y0) / (H * W)


def test_cutmix_cuts_one_box_of_the_authors_sizes():
    drawn = masks(4000, 0.0, 1.0)
    assert set(np.unique(drawn)) == {0.0, 1.0}
    for mask in drawn[:200]:
        cut = mask == 0
        rows, columns = np.flatnonzero(cut.any(axis=1)), np.flatnonzero(cut.any(axis=0))
        assert cut.sum() == len(rows) * len(columns), "not a rectangle"
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
    rng = np.random.default_rng(0)
    expected = [authors_box_share(rng) for _ in range(20_000)]
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(
        np.quantile(drawn.mean(axis=(1, 2)), quantiles), np.quantile(expected, quantiles), atol=0.04
    )
    # Boxes are anywhere: no pixel is always kept.
    assert (1 - drawn.mean(axis=0)).min() > 0.1


def test_either_is_drawn_in_half_of_the_cases():
    drawn = masks(2000, 0.8, 1.0)
    is_mixup = (drawn == drawn[:, :1, :1]).all(axis=(1, 2)) & (drawn[:, 0, 0] < 1)
    assert 0.46 < is_mixup.mean() < 0.54
    assert (masks(3, 0.0, 0.0) == 1).all()


def test_lighting_has_the_covariance_of_the_principal_components():
    light = np.array(mixing.lighting(jax.random.key(0), 50_000, 0.1), np.float64)
    values = np.array([0.2175, 0.0188, 0.0045])  # of RGB, as published with AlexNet
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-3)
    expected = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(light.T), expected, atol=0.03 * expected.max())
    assert np.abs(light.mean(axis=0)).max() < 3e-4
    assert (mixing.lighting(jax.random.key(0), 4, 0.0) == jnp.zeros((4, 3))).all()


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0, 3.0])
def test_symmetric_beta(alpha):
    drawn = mixing.symmetric_beta(jax.random.key(0), alpha, (20_000,))
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_drawing_a_mask_takes_no_loop():
    """For each round of a loop, a GPU's host would wait for the outcome."""
    draw = functools.partial(mixing.draw_mask, mixup_alpha=0.8, cutmix_alpha=1.0)
    program = str(jax.make_jaxpr(draw, static_argnums=(1, 2))(jax.random.key(0), H, W))
    assert not re.search("random_gamma|while|cond", program)
