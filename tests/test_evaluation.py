"""Means over examples, not over batches; precise BatchNorm statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convstem_jax import mixing
from convstem_jax.evaluation import evaluate, precise_batch_stats
from convstem_jax.step import Recipe, batch_statistics, split_model
from tests.networks import random_model


def test_every_example_weighs_the_same():
    def eval_step(params, batch_stats, batch):
        mask, wrong = batch["mask"], batch["wrong"] + params + batch_stats
        return {
            "examples": jnp.sum(mask, dtype=jnp.float32),
            "top1_errors": jnp.sum(mask & (wrong > 0), dtype=jnp.float32),
            "top5_errors": jnp.sum(mask & (wrong > 1), dtype=jnp.float32),
            "loss_sum": jnp.sum(mask * wrong),
        }

    batches = [  # 4 examples with 1 error, and 1 example with 1 error
        {"mask": jnp.array([True] * 4), "wrong": jnp.array([0.0, 0, 0, 1])},
        {"mask": jnp.array([True] + [False] * 3), "wrong": jnp.array([1.0, 1, 1, 1])},
    ]
    weights = {
        "ema": {"params": 0.0, "batch_stats": 0.0},
        "raw": {"params": 0.0, "batch_stats": 1.0},
    }
    results = evaluate(eval_step, weights, iter(batches))
    assert results["ema"] == {
        "top1_error": pytest.approx(40.0),  # not the mean of 25 % and 100 %
        "top5_error": 0.0,
        "loss": pytest.approx(0.4),
        "examples": 5,
    }
    assert results["raw"]["top1_error"] == 100.0
    assert results["raw"]["top5_error"] == pytest.approx(40.0)


def test_precise_statistics_are_means_over_batches():
    """Means of the batches' means and variances; the running statistics play no part."""
    recipe = Recipe(
        num_classes=10,
        optimizer="sgd",
        label_smoothing=0.0,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        lighting_std=0.1,
        ema_every=1,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    model = random_model("vitc_tiny", depth=0)
    graphdef, params, batch_stats = split_model(model)
    rng = np.random.default_rng(0)
    batches = [
        {"image": rng.integers(0, high, (16, 32, 32, 3)).astype(np.uint8)} for high in (64, 256)
    ]
    step = jax.jit(functools.partial(batch_statistics, graphdef, recipe))
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), batch_stats)
    weights = {"params": params, "batch_stats": broken}  # the running ones do not count
    got = precise_batch_stats(step, weights, batches)

    convolved = []
    for i, batch in enumerate(batches):
        light = np.array(mixing.lighting(jax.random.key(i), 16, 0.1))[:, None, None]
        images = (batch["image"] / np.float32(255) + light - 0.5) / 0.25
        convolved.append(np.array(model.stem.convs[0](images)))
    mean = np.mean([x.mean(axis=(0, 1, 2)) for x in convolved], axis=0)
    var = np.mean([x.var(axis=(0, 1, 2)) for x in convolved], axis=0)
    first = got["stem"]["norms"][0]
    np.testing.assert_allclose(first["mean"], mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(first["var"], var, rtol=1e-3)
    assert jax.tree.structure(got) == jax.tree.structure(batch_stats)

    recipe = dataclasses.replace(recipe, accumulate=2)
    halves = jax.jit(functools.partial(batch_statistics, graphdef, recipe))
    got = halves(params, batch_stats, batches[1], jax.random.key(1))["stem"]["norms"][0]["var"]
    expected = np.mean([convolved[1][i::2].var(axis=(0, 1, 2)) for i in range(2)], axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
