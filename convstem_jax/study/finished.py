"""A finished study, as its folder holds it."""

from collections.abc import Iterable
import dataclasses
import json
import os

import numpy as np

from convstem_jax.errors import ConfigError

_IDENTITY = ("kind", "model", "optimizer", "epochs", "lr", "wd", "seed")  # of a trial
_SAME = (
    *("vitp", "vitc", "cnn", "dataset", "train_split", "eval_split"),
    *("image_size", "batch_size", "data_seed"),
)


class Trials:
    """Records of trials, to select from."""

    def __init__(self, records: Iterable[dict]):
        self.records = list(records)

    def select(self, **wanted) -> list[dict]:
        """Records whose fields have these values, in the order of their seeds."""
        found = [r for r in self.records if all(r[key] == value for key, value in wanted.items())]
        return sorted(found, key=lambda r: r["seed"])

    def errors(self, **wanted) -> np.ndarray:
        """Errors of the selected trials."""
        return np.array([r["top1_error"] for r in self.select(**wanted)])

    def epochs(self, kind: str) -> list[float]:
        """Lengths of schedule that there are, the shortest first."""
        return sorted({r["epochs"] for r in self.records if r["kind"] == kind})

    def models(self, kind: str, prefix: str = "") -> list[str]:
        """Names of the models that there are."""
        found = {r["model"] for r in self.records if r["kind"] == kind}
        return sorted(name for name in found if name.startswith(prefix))


@dataclasses.dataclass(frozen=True)
class Study:
    """Finished studies of the same models on the same data: what they hold together."""

    config: dict  # of the first
    results: list[dict]  # result.json of each
    trials: Trials

    @property
    def families(self) -> tuple[str, str, str]:
        """Names of P, C and the CNN."""
        return self.config["vitp"], self.config["vitc"], self.config["cnn"]

    def seeds(self, model: str, optimizer: str, epochs: float) -> np.ndarray:
        """Errors of a model's seeds at its own optimum."""
        return self.trials.errors(kind="seeds", model=model, optimizer=optimizer, epochs=epochs)

    def optimum(self, model: str, optimizer: str) -> tuple[float, float] | None:
        """What the coarse grid chose, for the model or the one that it is a variant of: lr, wd."""
        base = next(name for name in self.families if model.startswith(name))
        grid = self.trials.select(kind="grid", model=base, optimizer=optimizer)
        best = min(grid, key=lambda trial: trial["top1_error"], default=None)
        return best and (best["lr"], best["wd"])


def read(folders: list[str]) -> Study:
    """Reads studies of the same models on the same data, as one.

    A trial that several of them hold counts once.

    Raises:
        ConfigError: one is not finished, or they do not belong together.
    """
    configs, results, trials = [], [], {}
    for folder in folders:
        try:
            with open(os.path.join(folder, "config.json")) as file:
                configs.append(json.load(file))
            with open(os.path.join(folder, "result.json")) as file:
                results.append(json.load(file))
            with open(os.path.join(folder, "trials.jsonl")) as file:
                records = [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no finished study: {error}") from error
        for record in records:
            trials.setdefault(tuple(record[name] for name in _IDENTITY), record)
    for name in _SAME:
        values = {str(config.get(name)) for config in configs}
        if len(values) > 1:
            raise ConfigError(f"studies differ in {name}: {' and '.join(sorted(values))}")
    return Study(configs[0], results, Trials(trials.values()))
