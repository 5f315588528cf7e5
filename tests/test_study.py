"""The study's plan, its claims on trials with known outcomes, and one whole study."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from convstem_jax.config import load_config
from convstem_jax.data import packed, sources
from convstem_jax.data.pack import pack
from convstem_jax.errors import ConfigError, Preempted
from convstem_jax.models import MODELS
from convstem_jax.study import __main__ as program
from convstem_jax.study import claims, experiments, report
from convstem_jax.study.experiments import Population
from convstem_jax.study.finished import Study
from convstem_jax.study.optima import beyond, choose, chosen_again
from convstem_jax.study.programs import Trial
from tests.made_up import made_up, plan


def test_every_population_is_there_once_and_can_be_run():
    for arg in ("", "full", "imagenet"):
        config, grids, later = plan(arg)
        names = [p.name for p in [*grids, *later]]
        assert len(set(names)) == len(names)
        for p in [*grids, *later]:
            assert p.model in MODELS
            run = experiments.run_config(config, p)
            assert (run.model, run.optimizer, run.epochs) == (p.model, p.optimizer, p.epochs)
            assert run.warmup_epochs < run.epochs
    assert {p.model for p in later} >= {"vitc_4gf_s4", "vitp_4gf_bn", "vitc_4gf_ln"}
    assert (MODELS["vitp_4gf_deep"].depth, MODELS["vitc_4gf_deep"].depth) == (48, 47)


def test_warm_up_and_evaluations_go_by_the_shortest_length():
    for arg in ("lengths=(40.0,80.0)", "full,lengths=(40.0,80.0)"):
        config, _, later = plan(arg)
        runs = [experiments.run_config(config, p) for p in later]
        assert {run.warmup_epochs for run in runs} == {4}
        assert {run.eval_every_epochs for run in runs} == {20}


def test_only_what_is_needed_is_searched_for():
    _, grids, later = plan("experiments=('length',)")
    usual = [("vitp_tiny", "adamw"), ("vitc_tiny", "adamw"), ("regnety_tiny", "sgd")]
    assert [(p.model, p.optimizer) for p in grids] == usual
    assert {(p.model, p.optimizer) for p in later} == set(usual)
    _, grids, _ = plan("experiments=('depth',)")
    assert [(p.model, p.optimizer) for p in grids] == usual[:2]


def test_no_comparison_has_a_seed_by_which_its_setting_was_chosen():
    _, grids, later = plan("cpu,grid_seeds=2,num_seeds=3")
    for p in grids:
        assert len(set(p.trials)) == 9 * 2 and {t.seed for t in p.trials} == {0, 1}
    assert {t.seed for p in later if p.kind == "seeds" for t in p.trials} == {2, 3, 4}


@pytest.mark.parametrize(
    "arg, model, lr, wd",
    [
        # As wide as the paper's, around the optimum.
        ("full", "vitp_tiny-sgd", (0.1 / 32**0.5, 0.1 * 32**0.5), (5e-4 / 30**0.5, 5e-4 * 30**0.5)),
        # The paper's, whatever the optimum.
        ("imagenet", "vitp_4gf-sgd", (0.1, 3.2), (4e-6, 1.2e-4)),
        ("imagenet", "vitc_4gf_deep-adamw", (2.5e-4, 8e-3), (0.02, 0.8)),
        ("imagenet", "regnety_4gf-adamw", (1.25e-3, 4e-2), (0.0075, 0.24)),
    ],
)
def test_random_settings_fill_their_intervals(arg, model, lr, wd):
    _, _, later = plan(f"{arg},num_random=2000")
    [population] = [p for p in later if p.kind == "random" and p.name.startswith(f"{model}-")]
    for field, (low, high) in (("lr", lr), ("wd", wd)):
        values = np.log([getattr(trial, field) for trial in population.trials])
        places = (values - np.log(low)) / np.log(high / low)
        assert 0 <= places.min() < 0.01 and 0.99 < places.max() < 1 + 1e-9
        assert abs(places.mean() - 0.5) < 0.02  # log-uniform
    _, _, again = plan(f"{arg},num_random=2000")
    assert population in again


def test_imagenets_optima_are_those_of_table_4():
    config, grids, later = plan("imagenet")
    assert not grids
    trials = {(p.model, p.optimizer): p.trials for p in later if p.kind == "seeds"}
    assert {(t.lr, t.wd) for t in trials["vitp_4gf", "sgd"]} == {(1.9, 1.3e-5)}
    assert {(t.lr, t.wd) for t in trials["vitc_4gf_s1", "adamw"]} == {(1e-3, 0.24)}
    study = Study(json.loads(config.to_json()), [], [])
    assert study.optimum("vitc_4gf_s1", "adamw") == (1e-3, 0.24)
    assert not study.on_edge("vitc_4gf_s1", "adamw")
    _, grids, _ = plan("imagenet,vitc=vitc_36gf")  # it is not in Table 4
    assert {p.model for p in grids} == {"vitc_36gf"}
    _, grids, later = plan("full,intervals=paper,experiments=('lr_wd',)")
    assert later and not grids, "no setting depends on an optimum"


def test_a_configuration_of_a_training_is_refused():
    with pytest.raises(ConfigError, match="no study's configuration: take configs/study.py"):
        experiments.grids(load_config("configs/quickstart.py"))


@pytest.mark.parametrize(
    "arg, message",
    [
        ("lengths=(3.0,2.0)", "config.lengths=.*the shortest first"),
        ("experiments=('lr',)", "config.experiments=.*some of length"),
        ("experiments=([1],)", "config.experiments=.*some of length"),
        ("lengths=('a','b')", "config.lengths=.*the shortest first"),
        ("adamw_center=('a',1)", "config.adamw_center=.*above 0"),
        ("grid_factors=(None,)", "config.grid_factors=.*the smallest first"),
        ("optima=(('vit','adamw',1e-3,0.1),)", "config.optima=.*rows of model"),
        ("optima=('vitc_tiny','adamw',1e-3,0.1)", "config.optima=.*rows of model"),
        ("optima=(1,)", "config.optima=.*rows of model"),
        ("optima=(('vitc_tiny','adamw','a',0.1),)", "config.optima=.*rows of model"),
        ("intervals=mine", "config.intervals='mine': it must be one of"),
        ("batch_size=15,mixup_alpha=0.8", "config.batch_size=15 is not divisible by .*2 images"),
        ("batch_size=32,accumulate=3", "config.batch_size=32 is not divisible by .*3 micro-batch"),
        ("imagenet,colour", "'imagenet' has colours already: leave out"),
        ("data_seed=-1", "config.data_seed=-1: it must be"),
        ("lr=0.1", "unknown config field 'lr'"),
        ("init_from=x", "unknown config field 'init_from'"),
        ("vitp=vit", "config.vitp='vit': it must be one of"),
        ("num_seed=3", "unknown config field 'num_seed': did you mean 'num_seeds'"),
    ],
)
def test_wrong_fields_are_refused(arg, message):
    with pytest.raises(ConfigError, match=message):
        config, grids, _ = plan(arg)
        experiments.run_config(config, grids[0])


def verdicts(records, **fields):
    config = json.loads(load_config("configs/study.py:full").to_json()) | fields
    found = claims.claims(Study(config, [], records))
    return {claim.name: claim for claim in found}


def test_what_is_true_is_supported_and_what_is_not_is_not():
    true, false, none = (verdicts(made_up(effect)) for effect in (2.0, -0.5, 0.0))
    assert len(true) == 14
    assert {claim.verdict for claim in true.values()} == {"supported"}
    assert {false[name].verdict for name in ("length", "peak", "stem s1")} == {"not supported"}
    undecided = [claim.verdict for claim in none.values()].count("undecided")
    assert undecided >= 12, "noise decides"
    few = verdicts(made_up(2.0, num_seeds=3))
    assert few["peak"].verdict == "undecided" and few["peak"].interval is None
    assert few["lr and wd, sgd"].verdict == "supported"


@pytest.mark.parametrize("num", [4, 16])
def test_noise_alone_decides_in_one_of_twenty_studies(num):
    """With 95 % intervals, also for 4 seeds, where plain percentiles decide in 18 %."""
    rng, decided = np.random.default_rng(0), 0
    for _ in range(200):
        groups = [claims.Group(label, rng.normal(size=num)) for label in "ab"]
        decided += claims._claim("", "", "", "", groups, np.subtract).verdict != "undecided"
    assert 0 < decided / 200 < 0.08


def test_errors_that_are_all_the_same_decide_nothing():
    groups = [claims.Group(label, np.full(5, error)) for label, error in (("a", 9.1), ("b", 9.0))]
    claim = claims._claim("", "", "", "", groups, np.subtract)
    assert claim.interval is None and claim.verdict == "undecided"


def test_a_trial_that_diverged_counts_as_failed():
    """However good its last error was."""
    records = made_up(0.0)
    for record in records:
        if record["model"].startswith("vitp"):
            record |= {"top1_error": 10.0, "diverged_at": 5}
    found = verdicts(records)
    for name in ("peak", "norm", "lr and wd, adamw", "lr and wd, sgd", "depth"):
        assert found[name].verdict == "supported" and found[name].num_diverged >= 5
    assert found["peak"].numbers["vitp_tiny, adamw, 40 epochs"] == 100
    grid = [
        {"lr": 1, "wd": 1, "seed": 0, "diverged_at": 5, "top1_error": 10},
        {"lr": 2, "wd": 3, "seed": 0, "diverged_at": None, "top1_error": 20},
    ]
    assert choose(grid) == (2, 3)


def test_the_grid_chooses_by_all_its_seeds():
    """The luckiest trial, and the setting that is best until a seed diverges, are not taken."""
    trials = [(1, 10, None), (2, 18, None), (4, 5, None), (1, 30, None), (2, 20, None), (4, 5, 7)]
    grid = [
        {"lr": lr, "wd": 1, "seed": i // 3, "top1_error": error, "diverged_at": step}
        for i, (lr, error, step) in enumerate(trials)
    ]
    assert choose(grid) == (2, 1)
    assert choose(grid[:3]) == (4, 1)
    # 4's are not both 5; 1's are both 30, or one of them is and 2's are not both 20.
    assert chosen_again(grid) == pytest.approx(3 / 4 * (1 / 4 + 1 / 2 * 3 / 4), abs=0.03)
    assert chosen_again(grid[:3]) is None
    # One that diverged weighs more than any error: 1 wins unless only good seeds of 2 are drawn.
    trials = [(lr, seed, 50 if lr == 1 else 10) for lr in (1, 2) for seed in range(3)]
    grid = [
        {"lr": lr, "wd": 1, "seed": seed, "top1_error": error, "diverged_at": None}
        for lr, seed, error in trials
    ]
    grid[-1]["diverged_at"] = 7
    assert choose(grid) == (1, 1)
    assert chosen_again(grid) == pytest.approx(1 - (2 / 3) ** 3, abs=0.03)


def test_an_optimum_on_the_edge_of_the_grid_is_known():
    config = json.loads(load_config("configs/study.py:full").to_json())
    same = {"kind": "grid", "model": "vitp_tiny", "optimizer": "sgd", "seed": 0, "epochs": 5}
    errors = {(1, 1): 9, (1, 2): 9, (1, 3): 9, (2, 1): 9, (2, 2): 5, (2, 3): 6, (3, 1): 9}
    records = [
        same | {"lr": lr, "wd": wd, "top1_error": error, "diverged_at": None}
        for (lr, wd), error in errors.items()
    ]
    study = Study(config, [], records)
    assert study.optimum("vitp_tiny_bn", "sgd") == (2, 2)
    assert not study.on_edge("vitp_tiny", "sgd")
    records[0]["top1_error"] = 1
    assert study.on_edge("vitp_tiny", "sgd")
    around = same | {"kind": "random", "lr": 1, "wd": 1, "top1_error": 9, "diverged_at": None}
    study.trials.extend([around, around | {"model": "vitc_tiny"}])
    found = claims._edf(study, "", "vitc_tiny", "vitp_tiny", "sgd", "", "")
    assert found.on_edge == ["area under the EDF, vitp_tiny"]
    assert "vitp_tiny 1.00 *" in report.claim_table([found])[1][2]


def test_a_grid_grows_beyond_the_edge_that_its_best_point_lies_on():
    _, [grid, *_], _ = plan("full,grid_seeds=2,adamw_center=(4.0,8.0)")

    def tried(*parts, best, **more):
        return [
            trial._asdict()
            | {
                "top1_error": abs(np.log(trial.lr / best[0])) + abs(np.log(trial.wd / best[1])),
                "diverged_at": None,
            }
            | more
            for part in parts
            for trial in part.trials
        ]

    assert experiments.widen(grid, tried(grid, best=(4, 8))) is None
    assert experiments.widen(grid, tried(grid, best=(4, 8), top1_error=50)) is None, "all alike"
    assert experiments.widen(grid, tried(grid, best=(4, 1e-9), diverged_at=5)) is None
    one = experiments.widen(grid, tried(grid, best=(4, 1e-9)))
    assert one.name == f"{grid.name}-1" and {t.seed for t in one.trials} == {0, 1}
    assert {(t.lr, t.wd) for t in one.trials} == {(1, 0.5), (4, 0.5), (16, 0.5)}
    corner = experiments.widen(one, tried(grid, one, best=(1e9, 1e-9)))
    assert {(t.lr, t.wd) for t in corner.trials} == {
        *((64, wd) for wd in (0.125, 0.5, 2, 8, 32)),
        *((lr, 0.125) for lr in (1, 4, 16)),
    }
    _, [point, *_], _ = plan("full,grid_factors=(1.0,)")
    assert experiments.widen(point, tried(point, best=(9, 9))) is None


def test_a_grid_does_not_grow_along_what_makes_no_difference():
    """Where only seeds differ, the best of three values is on an edge two times in three."""
    rng, grown = np.random.default_rng(0), 0
    for _ in range(200):
        grid = [
            {"lr": lr, "wd": wd, "seed": seed, "diverged_at": None}
            | {"top1_error": 20 + 5 * abs(lr - 2) + rng.normal()}
            for lr in (1, 2, 3) for wd in (1, 2, 3) for seed in range(3)
        ]  # fmt: skip
        lrs, wds = beyond(grid)
        assert not lrs
        grown += bool(wds)
    assert grown < 80, "it is 133 without a margin"


def test_experiments_that_were_not_made_have_no_claims():
    records = made_up(2.0)
    names = {name.split(",")[0] for name in verdicts(records, experiments=["lr_wd"])}
    assert names == {"lr and wd", "CNN's lr and wd"}
    assert set(verdicts(records, experiments=["norms"])) == {"norm", "norm of patchify"}
    assert set(verdicts(records, experiments=["length"], lengths=[5.0])) == {"peak"}


def test_area_under_the_edf():
    assert claims._area(np.array([5.0, 5.0])) == 1
    assert claims._area(np.array([5.0, 10.0, 99.0])) == pytest.approx(0.5)
    assert claims._area(np.array([5.0, 100.0])) == 0.5
    assert claims._area(np.array([100.0, 100.0])) == 0, "all diverged"


def test_noise_of_the_best_setting_alone_decides_little():
    """All settings are equally good; each bootstrap sample has a best one of its own."""
    rng, decided = np.random.default_rng(0), 0
    for _ in range(100):
        groups = [
            claims.Group(label, rng.normal(20, 1, 32), summary=claims._area) for label in "ab"
        ]
        decided += claims._claim("", "", "", "", groups, np.subtract).verdict != "undecided"
    assert decided < 12


def test_a_study_finds_optima_then_trains_around_them(tmp_path, monkeypatch, capsys):
    """Only the training is made up: the largest learning rate of the grid is the best."""
    seen, compiled, stop_at = [], [], [3]

    def train(config, trials, folder, *, progress, new_programs, **unused):
        if len(seen) in stop_at:
            raise Preempted("stopped")
        os.makedirs(folder, exist_ok=True)
        new_programs(len(trials))
        seen.append((folder.rsplit("/")[-1], config.optimizer, trials))
        progress(0, len(trials), 0.0, 1.0, np.ones(len(trials)))
        about = {"diverged_at": None, "curve": [[1.0, 9.0]], "device": "2 x x", "commit": "c"}
        about |= {"seconds": 2}
        return [t._asdict() | {"top1_error": 50 / t.lr**0.1} | about for t in trials]

    def run(*more):
        flags = ["--workdir", str(tmp_path / "run"), "--config.memory_gb=2"]
        return program.main([*flags, "--config.max_widenings=2", *more])

    monkeypatch.setattr(program, "train_population", train)
    monkeypatch.setattr(program, "Programs", lambda *args, memory: compiled.append((*args, memory)))
    assert run() == 75
    assert run("--config.batch_size=64") == 2
    assert "holds a run of another configuration (batch_size is 32" in capsys.readouterr().err
    stop_at.clear()
    seen.clear()
    compiled.clear()
    assert run() == 0

    assert {memory for *_, memory in compiled} == {2**31}
    made = [(config.model, config.optimizer, num) for config, _, num, _ in compiled]
    assert len(set(made)) == len(made), "the same program twice"
    names = [name for name, *_ in seen]
    assert ["-grid" in name for name in names] == [True] * 18 + [False] * (len(seen) - 18)
    best = {"adamw": 2e-3 * 64, "sgd": 0.1 * 64}
    for name, optimizer, trials in seen:
        if name.endswith("seeds"):
            assert [t.seed for t in trials] == [1, 2]
            assert [t.lr for t in trials] == pytest.approx([best[optimizer]] * 2)
    records = [json.loads(x) for x in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert len(records) == sum(len(trials) for *_, trials in seen)
    output = capsys.readouterr().out
    assert "100% of all, 0 min 00 s left" in output and "report/index.html" in output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trials"] == len(records) and result["seconds"] == 2 * len(records)
    assert (result["device"], result["commit"]) == ("2 x x", "c"), "not those that trained"

    seen.clear()
    (tmp_path / "run" / "report" / "index.html").unlink()
    assert run() == 0 and not seen
    assert "this study is finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "index.html").exists()


BARE = """
import dataclasses, sys
absent = ["tensorflow", "tensorflow_datasets", "array_record", "grain", "clu", "torch"]
absent += ["matplotlib", "safetensors"]
sys.modules.update(dict.fromkeys(absent))
from convstem_jax.models import MODELS
from convstem_jax.study import __main__ as program
for name in ("vitp_tiny", "vitc_tiny"):
    MODELS[name] = dataclasses.replace(MODELS[name], depth=1)
MODELS["regnety_tiny"] = dataclasses.replace(MODELS["regnety_tiny"], depths=(1,), widths=(32,))
sys.exit(program.main(sys.argv[1:]))
"""


def test_a_whole_study_where_there_is_jax_and_a_packed_file_alone(tmp_path):
    """On one device; nothing is made up, but the networks are small."""
    splits = {
        name: pack(sources.open_split("datasets", "fashion_mnist_10k", f"{name}[:64]"))
        for name in ("train", "test")
    }
    packed.write(str(tmp_path / "fashion_mnist_10k.npz"), splits, list("0123456789"))
    fields = {
        "experiments": "('length',)", "lengths": "(1.0,2.0)", "grid_factors": "(1.0,)",
        "num_seeds": 1, "train_split": "train", "eval_split": "test", "data_dir": tmp_path,
        "warmup_share": 0, "batch_size": 16,
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", BARE, *flags, f"--workdir={workdir}"],
        timeout=250, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (workdir / "trials.jsonl").read_text().splitlines()]
    assert len(records) == 9 and all(0 < record["top1_error"] < 100 for record in records)
    assert f"python -m convstem_jax.study.report {workdir}" in done.stdout, "no remedy"
    assert not (workdir / "report").exists()


def test_time_left_counts_what_this_session_does(monkeypatch, capsys):
    """Four equal populations; one and three quarters of another were done in an earlier session."""
    monkeypatch.setattr(program.time, "perf_counter", lambda: clock[0])
    clock = [0.0]
    trial = Trial(1.0, 1.0, 0)
    plan = [Population(kind, "vitp_tiny", "sgd", 1.0, (trial,) * 2) for kind in "abcd"]
    run = experiments.run_config(load_config("configs/study.py"), plan[0])
    progress = program._Progress({("vitp_tiny", "sgd"): run}, plan)
    result = {"top1_error": 1.0, "diverged_at": None}
    progress.start(plan[0])
    progress.finish(plan[0], [result])
    progress.start(plan[1])
    clock[0] = 60.0  # for half of a trial, and four are left
    progress.show(1, 1, 0.5, 1.0, np.ones(1))
    assert "50% of all, 8 min 00 s left" in capsys.readouterr().out
