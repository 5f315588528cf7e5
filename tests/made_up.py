"""A study that nobody has trained: its outcome is made up, and so known."""

import json
import pathlib

import numpy as np

from convstem_jax.config import load_config
from convstem_jax.study import experiments
from convstem_jax.study.optima import known_optima


def plan(arg=""):
    config = load_config(f"configs/study.py:{arg}")
    grids = experiments.grids(config)
    optima = {(p.model, p.optimizer): config[f"{p.optimizer}_center"] for p in grids}
    optima |= known_optima(config)
    return config, grids, experiments.populations(config, optima)


def made_up(effect, num_seeds=5):
    """Trials in which every claim is true by `effect` points, in noise of 0.1."""
    config, grids, later = plan(f"full,num_seeds={num_seeds}")
    rng, records = np.random.default_rng(0), []
    for p in [*grids, *later]:
        patchify = p.model.startswith("vitp")
        for trial in p.trials:
            error = 20 + 0.1 * rng.normal() + effect * patchify
            error += effect * patchify * (p.optimizer == "sgd")
            error += effect * patchify * (p.epochs == min(p.epochs, 5))
            error += 0.2 * effect * p.model.endswith("_s3")
            if p.kind == "grid":  # its centre is the optimum
                error += (trial.lr, trial.wd) != config[f"{p.optimizer}_center"]
            if p.kind == "random":
                error += abs(rng.normal()) * (1 + effect * patchify)
            about = {"kind": p.kind, "model": p.model, "optimizer": p.optimizer}
            records.append(
                about | trial._asdict()
                | {"epochs": p.epochs, "top1_error": error, "diverged_at": None, "curve": []}
            )  # fmt: skip
    return records


def write(folder: pathlib.Path, num_seeds: int = 5) -> None:
    """Writes a finished study in which every claim is true."""
    folder.mkdir(exist_ok=True)
    records = made_up(2.0, num_seeds)
    (folder / "trials.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.json").write_text(load_config("configs/study.py:full").to_json())
    result = {
        "versions": {"jax": "1"}, "device": "1 x <device>", "seconds": 60, "commit": "abc",
        "train_examples": 60_000, "eval_examples": 10_000,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
