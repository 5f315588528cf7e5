"""Means over examples, not over batches."""

import jax.numpy as jnp
import pytest

from convstem_jax.evaluate import evaluate


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
