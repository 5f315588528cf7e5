"""What the study trains: a coarse grid for each model's optimum, then the six experiments."""

import dataclasses
import itertools
import math
import zlib

import ml_collections
import numpy as np

from convstem_jax import build, rules
from convstem_jax.errors import ConfigError
from convstem_jax.models import MODELS
from convstem_jax.optim import OPTIMIZERS
from convstem_jax.study.optima import Optima, beyond, family_of, known_optima
from convstem_jax.study.programs import Trial

# What the paper draws learning rates and weight decays from (section 5.3): lowest and highest.
INTERVALS = {
    ("vit", "adamw"): ((2.5e-4, 8e-3), (0.02, 0.8)),
    ("vit", "sgd"): ((0.1, 3.2), (4e-6, 1.2e-4)),
    ("regnety", "adamw"): ((1.25e-3, 4e-2), (0.0075, 0.24)),
    ("regnety", "sgd"): ((0.25, 8), (3e-6, 8e-5)),
}

EXPERIMENTS = ("length", "optimizer", "lr_wd", "stems", "norms", "depth")


def _are_positive(values) -> bool:
    return bool(values) and all(type(v) in (int, float) and 0 < v < math.inf for v in values)


def _are_increasing(values) -> bool:
    return _are_positive(values) and all(a < b for a, b in itertools.pairwise(values))


def _are_optima(rows) -> bool:
    pairs = list(itertools.product(MODELS, OPTIMIZERS))
    return all(
        isinstance(row, (tuple, list)) and tuple(row[:2]) in pairs and _is_setting(row[2:])
        for row in rows
    )


def _is_setting(values) -> bool:
    return len(values) == 2 and _are_positive(values)


_CENTER = (tuple, _is_setting, "a learning rate and a weight decay, above 0")
# Fields of a study besides those of a run; rules as in `rules.RULES`.
RULES = {
    "experiments": (
        tuple,
        lambda v: v and all(x in EXPERIMENTS for x in v),
        "some of " + ", ".join(EXPERIMENTS),
    ),
    "vitp": rules.one_of(MODELS),
    "vitc": rules.one_of(MODELS),
    "cnn": rules.one_of(MODELS),
    "lengths": (tuple, _are_increasing, "numbers of epochs above 0, the shortest first"),
    "cnn_image_size": rules.integer(1),
    "cnn_eval_resize": rules.integer(1),
    "warmup_share": rules.number(lambda v: 0 <= v < 1, "of 0 or more, below 1"),
    "evals_of_shortest": rules.integer(1),
    "num_seeds": rules.integer(1),
    "num_random": rules.integer(1),
    "intervals": rules.one_of(("own", "paper")),
    "optima": (tuple, _are_optima, "rows of model, optimiser, learning rate and weight decay"),
    "grid_seeds": rules.integer(1),
    "grid_factors": (tuple, _are_increasing, "factors above 0, the smallest first"),
    "max_widenings": rules.integer(0),
    "adamw_center": _CENTER,
    "sgd_center": _CENTER,
    "memory_gb": rules.number(lambda v: v >= 0, "of 0 or more"),
    "host_memory_gb": rules.number(lambda v: v >= 0, "of 0 or more"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Population:
    """Trials that are trained together."""

    kind: str  # grid, seeds or random
    model: str
    optimizer: str
    epochs: float
    trials: tuple[Trial, ...]
    widened: int = 0  # how many populations of the same grid came before

    @property
    def name(self) -> str:
        """Name of the population and of its folder."""
        widened = f"-{self.widened}" if self.widened else ""
        return f"{self.model}-{self.optimizer}-{self.epochs:g}ep-{self.kind}{widened}"


def grids(config: ml_collections.ConfigDict) -> list[Population]:
    """The coarse grid around the configuration's centre, for each optimum needed but not known.

    Raises:
        ConfigError: a field of the study is wrong.
    """
    if "experiments" not in config:
        raise ConfigError("--config is no study's configuration: take configs/study.py")
    of_runs = {name: rule for name, rule in rules.RULES.items() if name in config}
    # -1, an order for each seed, would need its own batches for each trial.
    rules.check_fields(config, of_runs | RULES | {"data_seed": rules.integer(0)})
    names = families(config)
    pairs = list(itertools.product(names, OPTIMIZERS))
    centers = {pair: config[f"{pair[1]}_center"] for pair in pairs}
    needed = {
        (family_of(p.model, names), p.optimizer)
        for p in populations(config, centers)
        if p.kind == "seeds" or config.intervals == "own"
    }
    needed -= known_optima(config).keys()
    factors = (config.grid_factors, config.grid_factors, range(config.grid_seeds))

    def trials(lr, wd):
        return tuple(Trial(lr * a, wd * b, seed) for a, b, seed in itertools.product(*factors))

    return [
        Population("grid", *pair, config.lengths[0], trials(*centers[pair]))
        for pair in pairs
        if pair in needed
    ]


def widen(grid: Population, tried: list[dict]) -> Population | None:
    """The points one step beyond the edges of a grid on which its best point lies: see `beyond`.

    Args:
        grid: the grid's newest population.
        tried: records of the trials of all the grid's populations.

    Returns:
        None where the best point lies inside.
    """
    axes = [
        [*sorted({trial[name] for trial in tried}), *more]
        for name, more in zip(("lr", "wd"), beyond(tried), strict=True)
    ]
    there = {(trial["lr"], trial["wd"]) for trial in tried}
    points = [point for point in itertools.product(*axes) if point not in there]
    seeds = sorted({trial["seed"] for trial in tried})
    trials = tuple(Trial(*point, seed) for point in points for seed in seeds)
    return dataclasses.replace(grid, trials=trials, widened=grid.widened + 1) if trials else None


def populations(config: ml_collections.ConfigDict, optima: Optima) -> list[Population]:
    """What the experiments need, each population once.

    Args:
        config: the study's.
        optima: best setting of each model that the configuration names, if needed; a variant takes
            that of the model that it is a variant of.
    """
    seeds, random = set(), set()  # (model, optimiser, epochs)
    first, second = config.lengths[0], config.lengths[:2][-1]
    for experiment in config.experiments:
        match experiment:
            case "length" | "optimizer":
                both = experiment == "optimizer"
                for model, epochs in itertools.product(families(config), config.lengths):
                    used = OPTIMIZERS if both else [usual_optimizer(model)]
                    seeds |= {(model, optimizer, epochs) for optimizer in used}
            case "lr_wd":
                random |= {
                    (*pair, first) for pair in itertools.product(families(config), OPTIMIZERS)
                }
            case "stems":
                seeds |= {(*pair, first) for pair in itertools.product(stems(config), OPTIMIZERS)}
            case "norms":
                seeds |= {(model, "adamw", second) for model in norms(config)}
            case "depth":
                random |= {(model, "adamw", first) for model in deep(config)}

    def optimum(model, optimizer):
        return optima[family_of(model, families(config)), optimizer]

    def at_optimum(model, optimizer):
        # The grid's seeds would count errors that were chosen for being low.
        first = config.grid_seeds
        lr, wd = optimum(model, optimizer)
        return tuple(Trial(lr, wd, seed) for seed in range(first, first + config.num_seeds))

    def at_random(model, optimizer):
        # Log-uniform in the paper's interval, or in one as wide around the optimum.
        rng = np.random.default_rng(zlib.crc32(f"{model} {optimizer}".encode()))
        exponents = rng.uniform(-0.5, 0.5, size=(config.num_random, 2))
        family = "vit" if model.startswith("vit") else "regnety"
        low, high = np.array(INTERVALS[family, optimizer]).T
        is_paper = config.intervals == "paper"
        center = np.sqrt(low * high) if is_paper else optimum(model, optimizer)
        settings = center * (high / low) ** exponents
        return tuple(Trial(lr, wd, i) for i, (lr, wd) in enumerate(settings.tolist()))

    return [
        Population(kind, model, optimizer, epochs, trials(model, optimizer))
        for kind, trials, wanted in (("seeds", at_optimum, seeds), ("random", at_random, random))
        for model, optimizer, epochs in sorted(wanted)
    ]


def families(config: ml_collections.ConfigDict) -> tuple[str, str, str]:
    """The three models that the study compares."""
    return config.vitp, config.vitc, config.cnn


def usual_optimizer(model: str) -> str:
    """The optimiser that the model is usually trained with (Figure 2)."""
    return "adamw" if model.startswith("vit") else "sgd"


def stems(config: ml_collections.ConfigDict) -> list[str]:
    """P, C, and as many of S1 to S4 as the patch size allows (Table 3)."""
    variants = [f"{config.vitc}_s{i}" for i in range(1, 5)]
    return [config.vitp, config.vitc, *(name for name in variants if name in MODELS)]


def norms(config: ml_collections.ConfigDict) -> list[str]:
    """P, P with BatchNorm and ReLU, C, C with LayerNorm (Figure 7)."""
    return [config.vitp, f"{config.vitp}_bn", config.vitc, f"{config.vitc}_ln"]


def deep(config: ml_collections.ConfigDict) -> list[str]:
    """A deep P and a deep C (Figure 8)."""
    return [f"{config.vitp}_deep", f"{config.vitc}_deep"]


def run_config(
    config: ml_collections.ConfigDict, population: Population
) -> ml_collections.ConfigDict:
    """Configuration of a population's runs: what `main` would be given for one of them.

    Raises:
        ConfigError: a field of the runs is wrong.
    """
    own = {name: value for name, value in config.items() if name not in RULES}
    run = ml_collections.ConfigDict(own)
    run.model, run.optimizer, run.epochs = population.model, population.optimizer, population.epochs
    run.lr, run.wd, run.seed = population.trials[0]
    run.init_from, run.state_sharding, run.profile_step = "", "replicated", 0
    run.num_threads = run.prefetch = run.keep_checkpoints = 1
    # The same number of epochs for all lengths, as in the paper.
    run.warmup_epochs = config.warmup_share * config.lengths[0]
    run.eval_every_epochs = config.lengths[0] / config.evals_of_shortest
    if population.model.startswith(config.cnn):
        run.image_size, run.eval_resize = config.cnn_image_size, config.cnn_eval_resize
    rules.validate(run)
    build.check_batch(run, num_devices=1)
    return run
