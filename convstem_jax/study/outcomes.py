"""What trials end with."""

import numpy as np

FAILED = 100.0  # top-1 error (%) that a diverged trial counts as


def errors(trials: list[dict]) -> np.ndarray:
    """Last errors that could be measured: what the paper plots."""
    return np.array([trial["top1_error"] for trial in trials])


def outcomes(trials: list[dict]) -> np.ndarray:
    """Errors with which the trials count: one that diverged has failed, whatever it was."""
    return np.array([FAILED if t["diverged_at"] is not None else t["top1_error"] for t in trials])


def num_diverged(trials: list[dict]) -> int:
    """How many of the trials diverged."""
    return sum(trial["diverged_at"] is not None for trial in trials)
