"""A model's optimum: the best setting of a coarse grid, or one that the configuration gives."""

from collections.abc import Mapping, Sequence

import numpy as np

from convstem_jax.study.outcomes import FAILED, errors, outcomes

Optima = dict[tuple[str, str], tuple[float, float]]  # (model, optimiser) -> lr, wd


def family_of(model: str, families: Sequence[str]) -> str:
    """Which of the families a model is a variant of."""
    return next(name for name in families if model.startswith(name))


def known_optima(config: Mapping) -> Optima:
    """Optima that a study's configuration gives, for which no grid is searched."""
    return {(model, optimizer): (lr, wd) for model, optimizer, lr, wd in config["optima"]}


def settings_of(grid: list[dict]) -> dict[tuple[float, float], list[dict]]:
    """The trials of each setting, a learning rate and a weight decay, in the order of its seeds."""
    found = {}
    for trial in sorted(grid, key=lambda trial: trial["seed"]):
        found.setdefault((trial["lr"], trial["wd"]), []).append(trial)
    return found


def choose(grid: list[dict]) -> tuple[float, float]:
    """The learning rate and weight decay with which the fewest seeds diverged.

    If there are several, the setting with the lowest mean error.
    """
    settings = settings_of(grid)
    return list(settings)[_badness(*_results(settings)).argmin()]


def chosen_again(grid: list[dict]) -> float | None:
    """How often `choose` would take the same setting with other seeds, by the bootstrap.

    None where there is one seed, which says nothing about others.
    """
    settings = settings_of(grid)
    results = _results(settings)
    num_seeds = results[0].shape[1]
    if num_seeds == 1:
        return None
    drawn = np.random.default_rng(0).integers(num_seeds, size=(2000, *results[0].shape))
    resampled = (np.take_along_axis(x[None], drawn, axis=2) for x in results)
    chosen = _badness(*resampled).argmin(axis=1)
    return float(np.mean(chosen == _badness(*results).argmin()))


def _results(settings: dict[tuple, list[dict]]) -> tuple[np.ndarray, np.ndarray]:
    """Errors, and which trials diverged, each `[settings, seeds]`."""
    diverged = [[t["diverged_at"] is not None for t in trials] for trials in settings.values()]
    return np.array([errors(trials) for trials in settings.values()]), np.array(diverged)


def _badness(found: np.ndarray, diverged: np.ndarray) -> np.ndarray:
    """Per setting, from `[..., settings, seeds]`: one more that diverged outweighs any error."""
    return found.mean(axis=-1) + (1 + FAILED) * diverged.sum(axis=-1)


def beyond(grid: list[dict]) -> tuple[list[float], list[float]]:
    """Learning rates and weight decays one step beyond an edge that the best point lies on.

    There is at most one of each. There is none where the next value inside is as good within the
    seeds' noise: where nothing depends on a value, the best lies on an edge in two of three grids.
    """
    best, settings, found = choose(grid), settings_of(grid), []
    for i, name in enumerate(("lr", "wd")):
        values = sorted({trial[name] for trial in grid})
        edges = {values[0]: values[1], values[-1]: values[-2]} if len(values) > 1 else {}
        inside = [trial for trial in grid if trial[name] == edges.get(best[i])]
        is_on_edge = inside and _is_better(settings[best], settings[choose(inside)])
        found.append([best[i] ** 2 / edges[best[i]]] if is_on_edge else [])
    return tuple(found)


def _is_better(one: list[dict], other: list[dict]) -> bool:
    """Whether a setting's trials are better by more than a standard error, seed by seed."""
    gains = outcomes(other) - outcomes(one)
    return gains.mean() > gains.std() / np.sqrt(max(1, len(gains) - 1))
