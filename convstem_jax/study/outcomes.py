"""The errors with which trials end, and how diverged ones count."""

import numpy as np

FAILED = 100.0  # top-1 error (%) that a diverged trial counts as


def errors(trials: list[dict]) -> np.ndarray:
    """The last error of each trial that could be measured: what the paper plots."""
    return np.array([trial["top1_error"] for trial in trials])


def outcomes(trials: list[dict]) -> np.ndarray:
    """Errors with which the trials count: a diverged one counts as failed, whatever its error."""
    return np.array([FAILED if t["diverged_at"] is not None else t["top1_error"] for t in trials])


def num_diverged(trials: list[dict]) -> int:
    """How many of the trials diverged."""
    return sum(trial["diverged_at"] is not None for trial in trials)
