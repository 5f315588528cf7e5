"""Evaluation: precise BatchNorm statistics, then every example exactly once."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from convstem_jax.lead import Lead
from convstem_jax.step import PyTree


def evaluate(
    eval_step: Callable, weights: dict[str, PyTree], batches: Iterable
) -> dict[str, dict[str, float]]:
    """Evaluates one or several sets of weights in one pass over the data.

    Args:
        eval_step: `step.eval_step`, jitted, with its first two arguments bound; or mapped over
            trials.
        weights: name -> {"params", "batch_stats"}.
        batches: `pipeline.EvalBatches`, or dicts like those it yields; at least one example in all.

    Returns:
        For each name: `top1_error` and `top5_error` in percent, the mean cross-entropy `loss`, and
        the number of `examples`; lists of them, one for each trial, where there are trials.
    """
    # The sums stay on the device until the end, so that no batch waits for the host.
    sums, lead = {}, Lead()
    for batch in batches:
        new = {name: eval_step(w["params"], w["batch_stats"], batch) for name, w in weights.items()}
        sums = jax.tree.map(jnp.add, sums, new) if sums else new
        lead.add(new)
    return {name: _means(s) for name, s in jax.device_get(sums).items()}


def precise_batch_stats(
    batch_statistics: Callable, weights: PyTree, batches: Sequence[PyTree]
) -> PyTree:
    """Means of the BatchNorm statistics of several training batches ("precise" BatchNorm).

    Args:
        batch_statistics: `step.batch_statistics`, jitted, with its first two arguments bound.
        weights: {"params", "batch_stats"}.
        batches: of the training split, of equal size.

    Returns:
        Statistics to evaluate `weights["params"]` with.
    """
    sums = zeros = jax.tree.map(jnp.zeros_like, weights["batch_stats"])
    for i, batch in enumerate(batches):
        new = batch_statistics(weights["params"], zeros, batch, jax.random.key(i))
        sums = jax.tree.map(jnp.add, sums, new)
    return jax.tree.map(lambda x: x / len(batches), sums)


def _means(sums: dict) -> dict[str, float]:
    sums = {name: np.asarray(x, np.float64) for name, x in sums.items()}
    examples = sums["examples"]
    means = {
        "top1_error": 100 * sums["top1_errors"] / examples,
        "top5_error": 100 * sums["top5_errors"] / examples,
        "loss": sums["loss_sum"] / examples,
        "examples": examples.astype(int),
    }
    return {name: x.tolist() for name, x in means.items()}
