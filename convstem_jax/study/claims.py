"""The paper's claims, measured on the trials, each with an interval and a verdict (section 5)."""

from collections.abc import Callable, Iterator
import dataclasses

import numpy as np
from scipy import stats

from convstem_jax.study.finished import Study
from convstem_jax.study.outcomes import FAILED, num_diverged, outcomes

EDF_RANGE = 10.0  # points above a model's best error over which the area under its EDF is taken
# With 3 seeds on each side the order alone comes out right by chance too often: 1 time in 10.
MIN_SEEDS = 4
MIN_RANDOM = 16
NUM_RESAMPLES = 20_000


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim: `advantage` is positive where the trials agree with it."""

    name: str
    sentence: str
    figure: str  # of the paper
    drawing: str  # our figure's name
    numbers: dict[str, float]
    advantage: float  # in points of top-1 error, or a share of the EDF's area
    interval: tuple[float, float] | None  # 95 %, bootstrap; None from too few values
    num_values: int  # seeds or trials that it rests on, of the smallest group
    min_values: int  # with fewer the claim is undecided
    num_diverged: int  # among all of them
    on_edge: list[str]  # groups whose setting is on the edge of its coarse grid: perhaps not best

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "undecided"
        return "supported" if self.interval[0] > 0 else "not supported"


@dataclasses.dataclass(frozen=True)
class Group:
    """Trials that count as one number: `summary` of their errors, along the axis it is given."""

    label: str
    errors: np.ndarray
    num_diverged: int = 0
    on_edge: bool = False  # whether the setting that trials have or surround is on its grid's edge
    summary: Callable[..., np.ndarray] = np.mean


def claims(study: Study) -> list[Claim]:
    """All claims that the study's experiments have something to say about."""
    return [
        claim
        for name, claims_of in _CLAIMS.items()
        if name in study.config["experiments"]
        for claim in claims_of(study)
    ]


def _length(study: Study) -> Iterator[Claim]:
    short, long = study.lengths[0], study.lengths[-1]
    p, c, _ = study.families
    if short < long:
        yield _claim(
            "length",
            "A short schedule costs ViT fewer points of error with the convolutional stem.",
            "Figure 2",
            "length",
            [_seeds(study, m, "adamw", epochs) for m in (p, c) for epochs in (short, long)],
            lambda p_short, p_long, c_short, c_long: (p_short - p_long) - (c_short - c_long),
        )
    yield _claim(
        "peak",
        "At equal cost the convolutional stem has the lower error.",
        "Table 2",
        "length",
        [_seeds(study, model, "adamw", long) for model in (p, c)],
        lambda p, c: p - c,
    )


def _optimizer(study: Study) -> Iterator[Claim]:
    p, c, _ = study.families
    yield _claim(
        "optimizer",
        "SGD in place of AdamW costs patchify more than the convolutional stem.",
        "Figure 3",
        "optimizer",
        _both_optimizers(study, (p, c), study.lengths[-1]),
        lambda p_adamw, p_sgd, c_adamw, c_sgd: (p_sgd - p_adamw) - (c_sgd - c_adamw),
    )


def _stems(study: Study) -> Iterator[Claim]:
    p, c, _ = study.families
    stems = study.models("seeds", f"{c}_s")
    pairs = [(f"stem {s[len(c) + 1 :]}", p, s, "another convolutional stem") for s in stems]
    if stems:
        pairs.append(("fewer convolutions", stems[-1], c, "whose stem has more 3x3 convolutions"))
    for name, worse, better, about in pairs:
        yield _claim(
            name,
            f"{better}, {about}, has a lower error than {worse}, on average of AdamW and SGD.",
            "Table 3",
            "stems",
            _both_optimizers(study, (worse, better), study.lengths[0]),
            lambda w_adamw, w_sgd, b_adamw, b_sgd: (w_adamw - b_adamw + w_sgd - b_sgd) / 2,
        )


def _norms(study: Study) -> Iterator[Claim]:
    p, c, _ = study.families
    for name, patchify, sentence in (
        ("norm", p, "With LayerNorm too the convolutional stem has a lower error than patchify."),
        # Where the norm does the same to both stems, their errors differ by the stem's effect less
        # the norm's.
        (
            "norm of patchify",
            f"{p}_bn",
            "The stem matters more than its norm: with LayerNorm the convolutional one has a lower "
            "error than patchify with BatchNorm and ReLU.",
        ),
    ):
        yield _claim(
            name,
            sentence,
            "Figure 7",
            "norms",
            [_seeds(study, m, "adamw", study.second_length) for m in (patchify, f"{c}_ln")],
            lambda p, c_ln: p - c_ln,
        )


def _lr_wd(study: Study) -> Iterator[Claim]:
    p, c, cnn = study.families
    for optimizer in ("adamw", "sgd"):
        for name, better in (("lr and wd", c), ("CNN's lr and wd", cnn)):
            yield _edf(
                study, f"{name}, {optimizer}", better, p, optimizer, "Figures 4 and 5", "edf"
            )


def _depth(study: Study) -> Iterator[Claim]:
    p, c, _ = study.families
    yield _edf(study, "depth", f"{c}_deep", f"{p}_deep", "adamw", "Figure 8", "depth")


_CLAIMS = {
    "length": _length,
    "optimizer": _optimizer,
    "lr_wd": _lr_wd,
    "stems": _stems,
    "norms": _norms,
    "depth": _depth,
}


def _edf(study, name, better, worse, optimizer, figure, drawing) -> Claim:
    is_around_optimum = study.config["intervals"] == "own"

    def group(model):
        trials = study.random(model, optimizer)
        return Group(
            f"area under the EDF, {model}",
            outcomes(trials),
            num_diverged=num_diverged(trials),
            on_edge=is_around_optimum and study.on_edge(model, optimizer),
            summary=_area,
        )

    return _claim(
        name,
        f"Over random learning rates, weight decays and seeds {better} is more often near its best "
        f"than {worse} ({optimizer}).",
        figure,
        drawing,
        [group(better), group(worse)],
        lambda better, worse: better - worse,
        MIN_RANDOM,
    )


def _area(errors: np.ndarray, axis: int = -1) -> np.ndarray:
    """Area under the EDF of how far errors are above the lowest, as a share of `EDF_RANGE`.

    A trial adds the area to its right; one that failed adds nothing, even where all failed.
    """
    # Each bootstrap sample has its own lowest error. If it were fixed, noise alone would decide a
    # third of the claims on models whose settings are all good.
    above = errors - errors.min(axis=axis, keepdims=True)
    shares = np.where(errors < FAILED, np.clip(1 - above / EDF_RANGE, 0, 1), 0)
    return shares.mean(axis=axis)


def _seeds(study, model, optimizer, epochs) -> Group:
    trials = study.seeds(model, optimizer, epochs)
    label = f"{model}, {optimizer}, {epochs:g} epochs"
    return Group(
        label,
        outcomes(trials),
        num_diverged=num_diverged(trials),
        on_edge=study.on_edge(model, optimizer),
    )


def _both_optimizers(study, models, epochs) -> list[Group]:
    return [_seeds(study, m, optimizer, epochs) for m in models for optimizer in ("adamw", "sgd")]


def _claim(name, sentence, figure, drawing, groups, advantage, minimum=MIN_SEEDS) -> Claim:
    """`advantage` is a function of the groups' numbers, positive where the claim is true."""
    num = min(len(group.errors) for group in groups)
    numbers = {group.label: float(group.summary(group.errors, axis=-1)) for group in groups}
    return Claim(
        name=name,
        sentence=sentence,
        figure=figure,
        drawing=drawing,
        numbers=numbers,
        advantage=advantage(*numbers.values()),
        interval=_interval(groups, advantage) if num >= minimum else None,
        num_values=num,
        min_values=minimum,
        num_diverged=sum(group.num_diverged for group in groups),
        on_edge=[group.label for group in groups if group.on_edge],
    )


def _interval(groups: list[Group], advantage: Callable) -> tuple[float, float] | None:
    """95 % bootstrap interval of the advantage; groups are resampled independently.

    None where no group has errors that differ: the interval would be certain of any advantage.

    The percentile interval is expanded for small groups (Hesterberg 2015, "What teachers should
    know about the bootstrap", section 5.3): plain percentiles of 4 seeds cover 82 %, not 95 %.
    """

    def statistic(*samples, axis):
        pairs = zip(groups, samples, strict=True)
        return advantage(*(group.summary(sample, axis=axis) for group, sample in pairs))

    num = min(len(group.errors) for group in groups)
    if not any(group.errors.std() for group in groups):
        return None
    tail = stats.norm.cdf(-np.sqrt(num / (num - 1)) * stats.t.ppf(0.975, num - 1))
    found = stats.bootstrap(
        [group.errors for group in groups],
        statistic,
        vectorized=True,
        method="percentile",
        confidence_level=1 - 2 * tail,
        n_resamples=NUM_RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(0),
    )
    low, high = found.confidence_interval
    return float(low), float(high)
