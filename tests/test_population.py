"""Population training against single runs; divergence, memory, interruption."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest

from convstem_jax import train as train_module
from convstem_jax.config import load_config
from convstem_jax.errors import ConfigError, DataError, Preempted
from convstem_jax.metrics import read_jsonl
from convstem_jax.models import MODELS
from convstem_jax.study import population
from convstem_jax.study.population import train_population
from convstem_jax.study.programs import Programs, Trial, stack_hparams

pytestmark = pytest.mark.usefixtures("shallow")


def config(**fields):
    config = load_config("configs/quickstart.py:vitc,sgd")
    fields = {
        "eval_split": "test[:256]", "eval_batch_size": 128, "log_every_steps": 10, "epochs": 0.08,
        "warmup_epochs": 0.0125, "eval_every_epochs": 0.04, "batch_size": 16, "ema_every": 1,
        "checkpoint_every_steps": 20,
        "mixup_alpha": 0.8, "lighting_std": 0.1, "data_seed": 7,
        "precise_bn_examples": 32,
    } | fields  # fmt: skip
    for name, value in fields.items():
        config[name] = value
    return config


class Progress:
    def __init__(self):
        self.losses = {}

    def __call__(self, num_done, num_trials, first_share, share, losses):
        self.first_share = first_share
        self.losses[round(share, 2)] = losses


def new_programs(per_device, num_devices, model="vitc_tiny", **options):
    devices = jax.devices()[:num_devices]
    return Programs(config(model=model), 10, per_device, devices=devices, **options)


@functools.cache
def programs():
    """For two trials on one device, mapped over, as on a GPU."""
    return new_programs(2, 1)


def run(config, trials, folder, *, progress=None, stop=None, new_programs=None):
    with population.open_readers(config, memory=1e6) as readers:
        results = train_population(
            config, trials, str(folder), readers=readers, progress=progress or Progress(),
            stop_requested=stop or (lambda: False),
            new_programs=new_programs or (lambda num: programs()),
        )  # fmt: skip
    for result in results:
        assert result.pop("seconds") > 0 and result.pop("device") and result.pop("commit")
    return results


def test_a_trial_is_a_run_of_main(tmp_path, train_on):
    """50 steps; the losses agree to 1e-4, the errors to one of 256 images."""
    c = config()
    trials, progress = [Trial(c.lr / 3, c.wd, 0), Trial(c.lr / 10, c.wd * 3, 1)], Progress()
    results = run(c, trials, tmp_path / "all", progress=progress)
    train_on(1)
    c.lr, c.wd, c.seed = trials[1]
    result = train_module.train(c, str(tmp_path / "run"))
    records = read_jsonl(str(tmp_path / "run" / "metrics.jsonl"))
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    for step in range(10, 51, 10):
        other, loss = progress.losses[step / 50]
        assert loss == pytest.approx(losses[step], rel=1e-4), step
        assert abs(other / losses[step] - 1) > 1e-3, "trials are alike"
    assert results[1]["top1_error"] == pytest.approx(result["top1_error"], abs=0.4)
    assert results[1]["lr"] == c.lr and results[1]["diverged_at"] is None


def test_a_trial_that_diverges_disturbs_no_other_and_keeps_its_last_error(tmp_path):
    c = config(epochs=0.025, eval_every_epochs=0.005)
    good = Trial(0.1, 0.0, 0)
    alone = run(c, [good], tmp_path / "alone")
    bad, beside = run(c, [Trial(1e9, 0.0, 0), good], tmp_path / "both")
    assert bad["diverged_at"] and beside["diverged_at"] is None
    assert beside == alone[0]
    errors = [error for _, error in bad["curve"]]
    assert np.isfinite(errors).all()
    last = bad["diverged_at"] // 3 + 1  # evaluations are 3 or 4 steps apart
    assert len(set(errors[last:])) == 1, "a diverged trial goes on changing"
    assert len({error for _, error in beside["curve"]}) > 2


def test_a_trial_that_diverges_keeps_a_state_that_can_be_saved(monkeypatch):
    """AdamW's second moments are infinite before the weights or the loss are."""
    monkeypatch.setitem(MODELS, "vitp_tiny", dataclasses.replace(MODELS["vitp_tiny"], depth=4))
    c = config(model="vitp_tiny", optimizer="adamw", warmup_epochs=0.0)
    programs = Programs(c, 10, 1, devices=jax.devices()[:1])
    hparams = stack_hparams(c, [Trial(1e3, 0.1, 0)], 800)
    state, rng = programs.init(hparams.seed), np.random.default_rng(0)
    for _ in range(10):
        image = rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
        batch = {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}
        state, _ = programs.step(state, jax.device_put(batch, programs.replicated), hparams)
    assert state.updates[0] < 10, "it diverged"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.trials))


def test_too_large_a_population_is_split_with_the_same_results(tmp_path):
    """Over two devices, on which a patchify stem compiles sooner."""
    c = config(epochs=0.01, warmup_epochs=0.0, model="vitp_tiny")
    trials = [Trial(0.1, 0.0, seed) for seed in range(3)]
    both = new_programs(2, 2, "vitp_tiny")
    assert both.num_trials == 4
    whole = run(c, trials, tmp_path / "whole", new_programs=lambda num: both)
    fewer = new_programs(2, 2, "vitp_tiny", memory=0.9 * both.need)
    assert fewer.num_trials == 2
    assert run(c, trials, tmp_path / "parts", new_programs=lambda num: fewer) == whole
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == [
        "trials_000.jsonl", "trials_002.jsonl"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="one trial of vitp_tiny needs"):
        new_programs(1, 2, "vitp_tiny", memory=1000.0)


class StopAtTen(Progress):
    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def __call__(self, *args):
        self.stop.set()


def interrupt(c, trials, folder, **options):
    stop = threading.Event()
    with pytest.raises(Preempted, match="stopped at step 11 of 19"):
        run(c, trials, folder, progress=StopAtTen(stop), stop=stop.is_set, **options)


def never(num_trials):
    raise AssertionError("compiled for nothing")


def test_an_interrupted_population_goes_on(tmp_path):
    c = config(epochs=0.03)
    trials = [Trial(0.1, 1e-4, seed) for seed in range(2)]
    expected = run(c, trials, tmp_path / "uninterrupted")
    interrupt(c, trials, tmp_path / "interrupted")
    progress = Progress()
    assert run(c, trials, tmp_path / "interrupted", progress=progress) == expected
    assert list(progress.losses) == [1.0] and progress.first_share == 11 / 19, "it began again"
    again = run(c, trials, tmp_path / "interrupted", progress=progress, new_programs=never)
    assert again == expected and len(progress.losses) == 1, "it is not trained again"
    more = [*trials, Trial(0.1, 1e-4, 2)]
    assert run(c, more, tmp_path / "interrupted", progress=progress)[:2] == expected
    assert len(progress.losses) > 1, "the new trial is not trained"


def test_a_part_begins_again_where_another_number_is_trained_together(tmp_path, capsys):
    """First two together, even if one only fills up the devices; afterwards one at a time."""
    c, trials, asked = config(epochs=0.03), [Trial(0.1, 1e-4, 5), Trial(0.1, 1e-4, 6)], []
    one = new_programs(1, 1)

    def remember(programs):
        return lambda num: asked.append(num) or programs

    interrupt(c, trials[:1], tmp_path / "filled", new_programs=remember(programs()))
    progress = Progress()
    [result] = run(
        c, trials[:1], tmp_path / "filled", progress=progress, new_programs=remember(programs())
    )
    assert list(progress.losses) == [1.0], "it began again"
    assert asked == [1, 2], "as many are to be trained together as before"
    interrupt(c, trials, tmp_path / "two", new_programs=remember(programs()))
    again = run(c, trials, tmp_path / "two", progress=progress, new_programs=remember(one))
    assert "2 trials were trained together" in capsys.readouterr().out
    assert again[0]["top1_error"] == pytest.approx(result["top1_error"], abs=1)
    assert [other["seed"] for other in again] == [5, 6]


def test_checkpoints_of_no_part_are_not_read(tmp_path):
    """Such as those of a part whose folder was not quite removed."""
    c, trials = config(epochs=0.03), [Trial(0.1, 1e-4, 5)]
    interrupt(c, trials, tmp_path)
    part = tmp_path / "000" / "part.json"
    part.write_text("")
    with pytest.raises(DataError, match="part.json cannot be read.*delete .*/000, and its trials"):
        run(c, trials, tmp_path)
    part.unlink()
    progress = Progress()
    run(c, trials, tmp_path, progress=progress)
    assert len(progress.losses) > 1, "it went on"


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "trials_000.jsonl").write_text('{"lr": 0.1')
    with pytest.raises(DataError, match="trials_000.jsonl cannot be read.*delete it"):
        run(config(), [Trial(0.1, 1e-4, 0)], tmp_path)
