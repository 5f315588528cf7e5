"""Population training against single runs; divergence, memory, interruption."""

import threading

import jax
import numpy as np
import pytest

from convstem_jax import train as train_module
from convstem_jax.config import load_config
from convstem_jax.data import sources
from convstem_jax.errors import ConfigError, Preempted
from convstem_jax.metrics import read_jsonl
from convstem_jax.study import population
from convstem_jax.study.population import Trial, train_population


def config(arg="", **fields):
    config = load_config(f"configs/quickstart.py:{arg}")
    fields = {
        "eval_split": "test[:256]", "log_every_steps": 10, "epochs": 0.32, "warmup_epochs": 0.05,
        "eval_every_epochs": 0.16, "checkpoint_every_steps": 20,
    } | fields  # fmt: skip
    for name, value in fields.items():
        config[name] = value
    return config


class Progress:
    def __init__(self):
        self.losses = {}

    def __call__(self, num_trials, share, losses):
        self.losses[round(share, 2)] = losses


def run(config, trials, folder, *, progress=None, stop=None, memory=None):
    splits = tuple(
        sources.open_split(config.data_dir, config.dataset, split)
        for split in (config.train_split, config.eval_split)
    )
    return train_population(
        config, trials, str(folder), splits=splits, progress=progress or Progress(),
        stop=stop or threading.Event(),
        new_programs=lambda num: population.Programs(config, 10, num, memory),
    )  # fmt: skip


@pytest.mark.parametrize("arg, tolerance", [("vitc,sgd", 5e-3), ("vitp,adamw", 1e-4)])
def test_a_trial_is_a_run_of_main(arg, tolerance, tmp_path, monkeypatch):
    """50 steps. Rounding grows by ReLU's kinks and BatchNorm at SGD's large learning rate."""
    c, progress = config(arg, mixup_alpha=0.8, lighting_std=0.1, data_seed=7), Progress()
    trials = [
        Trial(c.lr * factor, c.wd * factor, seed) for factor, seed in ((1, 0), (0.3, 1), (3, 2))
    ]
    results = run(c, trials, tmp_path / "population", progress=progress)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    c.lr, c.wd, c.seed = trials[1]
    result = train_module.train(c, str(tmp_path / "run"))
    records = read_jsonl(str(tmp_path / "run" / "metrics.jsonl"))
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    for step in range(10, 51, 10):
        assert progress.losses[step / 50][1] == pytest.approx(losses[step], rel=tolerance), step
        assert abs(progress.losses[step / 50][0] / losses[step] - 1) > 2 * tolerance, (
            "trials are alike"
        )
    assert results[1]["top1_error"] == pytest.approx(result["top1_error"], abs=1)
    assert results[1]["lr"] == c.lr and results[1]["diverged_at"] is None


def test_a_trial_that_diverges_disturbs_no_other_and_keeps_its_last_error(tmp_path):
    c = config("vitc,sgd", epochs=0.1, eval_every_epochs=0.02)
    good = Trial(0.1, 0.0, 0)
    alone = run(c, [good], tmp_path / "alone")
    bad, beside, weak = run(c, [Trial(1e9, 0.0, 0), good, Trial(1e-9, 0.0, 0)], tmp_path / "all")
    assert bad["diverged_at"] and beside["diverged_at"] is None and weak["diverged_at"] is None
    assert beside == alone[0]
    errors = [error for _, error in bad["curve"]]
    assert np.isfinite(errors).all()
    last = bad["diverged_at"] // 3 + 1  # evaluations are 3 steps apart
    assert len(set(errors[last:])) == 1, "a diverged trial goes on changing"
    assert len({error for _, error in weak["curve"]}) >= 1


def test_too_large_a_population_is_split_with_the_same_results(tmp_path, monkeypatch):
    c = config("vitp,adamw", epochs=0.04, warmup_epochs=0.0)
    trials = [Trial(1e-3, 0.1, seed) for seed in range(11)]  # on 8 devices
    whole = run(c, trials, tmp_path / "whole", memory=1e12)
    two = population.Programs(c, 10, 16, memory=1e12)
    need = population._need(two.step)
    parts = run(c, trials, tmp_path / "parts", memory=0.9 * need)
    assert [p.name for p in sorted((tmp_path / "parts").iterdir())] == [
        "trials_000-007.jsonl", "trials_008-010.jsonl"
    ]  # fmt: skip
    assert two.num_trials == 16 and parts == whole
    with pytest.raises(ConfigError, match="one trial of vitp_tiny needs"):
        run(c, trials, tmp_path / "none", memory=1000.0)


def test_an_interrupted_population_goes_on(tmp_path, monkeypatch):
    c = config("vitc,adamw", epochs=0.12)
    trials = [Trial(1e-3, 0.1, seed) for seed in range(3)]
    expected = run(c, trials, tmp_path / "uninterrupted")
    stop = threading.Event()

    class StopAtTen(Progress):
        def __call__(self, step, *args):
            stop.set()

    with pytest.raises(Preempted, match="stopped at step 11 of 19"):
        run(c, trials, tmp_path / "interrupted", progress=StopAtTen(), stop=stop)
    progress = Progress()
    assert run(c, trials, tmp_path / "interrupted", progress=progress) == expected
    assert list(progress.losses) == [1.0], "it began again"
    monkeypatch.setattr(population, "Programs", None)  # nothing is left to compile
    assert run(c, trials, tmp_path / "interrupted") == expected
