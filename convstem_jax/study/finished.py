"""Finished studies, read from their folders."""

import dataclasses
import json
import os

from convstem_jax.errors import ConfigError
from convstem_jax.run_folder import FREE_FIELDS
from convstem_jax.study.optima import beyond, choose, family_of, known_optima

# Fields in which studies that are reported together may differ.
MAY_DIFFER = (*FREE_FIELDS, "experiments", "num_seeds", "num_random")
_IDENTITY = ("kind", "model", "optimizer", "epochs", "lr", "wd", "seed")  # of a trial
_OUTCOME = ("top1_error", "diverged_at")


@dataclasses.dataclass(frozen=True)
class Study:
    """Finished studies of the same models on the same data, taken together."""

    config: dict  # of the first, with the experiments of all
    results: list[dict]  # result.json of each
    trials: list[dict]  # their records

    @property
    def families(self) -> tuple[str, str, str]:
        """Names of P, C and the CNN."""
        return self.config["vitp"], self.config["vitc"], self.config["cnn"]

    @property
    def lengths(self) -> list[float]:
        """Epochs of the schedules, the shortest first."""
        return list(self.config["lengths"])

    @property
    def second_length(self) -> float:
        """Epochs of the experiment with norms: the second length, the paper's 100."""
        return self.lengths[:2][-1]

    def seeds(self, model: str, optimizer: str, epochs: float) -> list[dict]:
        """Trials of a model's seeds at its own optimum."""
        return self._select(kind="seeds", model=model, optimizer=optimizer, epochs=epochs)

    def random(self, model: str, optimizer: str) -> list[dict]:
        """Trials of a model's random settings."""
        return self._select(kind="random", model=model, optimizer=optimizer)

    def models(self, kind: str, prefix: str = "") -> list[str]:
        """Names of the models that have trials of a kind."""
        found = {trial["model"] for trial in self.trials if trial["kind"] == kind}
        return sorted(name for name in found if name.startswith(prefix))

    def best(self, model: str, optimizer: str) -> float:
        """The lowest error of a model's random settings.

        Where all diverged it is 0, so that none of them is near it.
        """
        tried = self.random(model, optimizer)
        survived = (trial["top1_error"] for trial in tried if trial["diverged_at"] is None)
        return min(survived, default=0.0)

    def optimum(self, model: str, optimizer: str) -> tuple[float, float] | None:
        """Best lr, wd of the model, or of the one that it is a variant of; None if not known."""
        known = known_optima(self.config).get((family_of(model, self.families), optimizer))
        grid = self.grid(model, optimizer)
        return known or (choose(grid) if grid else None)

    def on_edge(self, model: str, optimizer: str) -> bool:
        """Whether a grid chose the optimum on its edge, beyond which a better one may lie."""
        grid = self.grid(model, optimizer)
        return bool(grid) and any(beyond(grid))

    def grid(self, model: str, optimizer: str) -> list[dict]:
        """Trials of the coarse grid from which the model takes its optimum."""
        base = family_of(model, self.families)
        return self._select(kind="grid", model=base, optimizer=optimizer)

    def _select(self, **wanted) -> list[dict]:
        """Trials whose fields have these values, in the order of their seeds."""
        found = [t for t in self.trials if all(t[key] == value for key, value in wanted.items())]
        return sorted(found, key=lambda trial: trial["seed"])


def read(folders: list[str]) -> Study:
    """Reads studies whose configurations differ in no more than `MAY_DIFFER`, as one study.

    A trial that several of them hold counts once.

    Raises:
        ConfigError: one is not finished, or they do not belong together.
    """
    configs, results, trials, optima = [], [], {}, {}
    for folder in folders:
        try:
            with open(os.path.join(folder, "config.json")) as file:
                configs.append(json.load(file))
            with open(os.path.join(folder, "result.json")) as file:
                results.append(json.load(file))
            with open(os.path.join(folder, "trials.jsonl")) as file:
                records = [json.loads(line) for line in file]
            if "experiments" not in configs[-1]:
                raise ValueError("config.json is no study's")
            if not all(record.keys() >= {*_IDENTITY, *_OUTCOME} for record in records):
                raise ValueError("trials.jsonl has lines that are no trials")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder} holds no finished study: {error}") from error
        for record in records:
            trials.setdefault(tuple(record[name] for name in _IDENTITY), record)
        grid = [trial for trial in records if trial["kind"] == "grid"]
        for pair in sorted({(trial["model"], trial["optimizer"]) for trial in grid}):
            found = choose([t for t in grid if (t["model"], t["optimizer"]) == pair])
            if found != optima.setdefault(pair, found):
                raise ConfigError(
                    f"studies have other optima of {pair[0]} with {pair[1]}: lr, wd "
                    f"{optima[pair]} and {found}; report them one by one"
                )
    for name in sorted(set().union(*configs) - set(MAY_DIFFER)):
        values = {str(config.get(name)) for config in configs}
        if len(values) > 1:
            raise ConfigError(f"studies differ in {name}: {' and '.join(sorted(values))}")
    experiments = [name for config in configs for name in config["experiments"]]
    config = configs[0] | {"experiments": list(dict.fromkeys(experiments))}
    return Study(config, results, list(trials.values()))
