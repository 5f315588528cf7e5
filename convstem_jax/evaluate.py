"""Exact evaluation of a split: every example once, whatever the batch size and the devices."""

from collections.abc import Callable, Iterable

import jax

from convstem_jax.step import PyTree


def evaluate(
    eval_step: Callable, weights: dict[str, PyTree], batches: Iterable
) -> dict[str, dict[str, float]]:
    """Evaluates one or several sets of weights in one pass over the data.

    Args:
        eval_step: `step.eval_step`, jitted, with its first two arguments bound.
        weights: name -> {"params", "batch_stats"}.
        batches: `pipeline.EvalBatches`, or dicts like its own; at least one example in all.

    Returns:
        For each name: `top1_error` and `top5_error` in percent, the mean cross-entropy `loss`, and
        the number of `examples`.
    """
    # The sums stay on the device until the end, so that no batch waits for the host.
    sums = {}
    for batch in batches:
        new = {name: eval_step(w["params"], w["batch_stats"], batch) for name, w in weights.items()}
        sums = jax.tree.map(jax.numpy.add, sums, new) if sums else new
    return {name: _means(s) for name, s in jax.device_get(sums).items()}


def _means(sums: dict) -> dict[str, float]:
    examples = int(sums["examples"])
    return {
        "top1_error": 100 * float(sums["top1_errors"]) / examples,
        "top5_error": 100 * float(sums["top5_errors"]) / examples,
        "loss": float(sums["loss_sum"]) / examples,
        "examples": examples,
    }
