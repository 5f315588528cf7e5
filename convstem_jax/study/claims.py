"""The paper's claims as numbers of the trials, each with an interval and a verdict (section 5)."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from convstem_jax.study.finished import Trials

EDF_RANGE = 10.0  # points above a model's best error over which the area under its EDF is taken
MIN_VALUES = 3  # fewer seeds or trials decide nothing
NUM_RESAMPLES = 2000


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

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return "undecided"
        return "supported" if self.interval[0] > 0 else "not supported"


def edf_area(errors: np.ndarray, best: float | None = None) -> float:
    """Area under the empirical distribution of the errors above the best one, from 0 to 1."""
    best = errors.min() if best is None else best
    return float(np.clip(1 - (errors - best) / EDF_RANGE, 0, 1).mean())


def claims(trials: Trials, vitp: str, vitc: str, cnn: str) -> list[Claim]:
    """All claims that the trials have something to say about.

    Args:
        trials: of one data set.
        vitp: name of the model with the patchify stem.
        vitc: of the one with the convolutional stem.
        cnn: of the CNN.
    """
    found = []

    def add(name, sentence, figure, drawing, groups, statistic, numbers):
        if all(len(group) for group in groups):
            low = min(map(len, groups))
            interval = _bootstrap(groups, statistic) if low >= MIN_VALUES else None
            advantage = statistic(*groups)
            found.append(Claim(name, sentence, figure, drawing, numbers, advantage, interval, low))

    def seeds(model, optimizer, epochs):
        return trials.errors(kind="seeds", model=model, optimizer=optimizer, epochs=epochs)

    def random(model, optimizer):
        return trials.errors(kind="random", model=model, optimizer=optimizer)

    lengths = trials.epochs("seeds")
    if lengths:
        short, long = lengths[0], lengths[-1]
        groups = [seeds(m, "adamw", e) for m in (vitp, vitc) for e in (short, long)]
        add(
            "length",
            "With the convolutional stem ViT converges faster: a short schedule costs it less.",
            "Figure 2",
            "length",
            groups if short < long else [[]],
            lambda p0, p1, c0, c1: (p0.mean() - p1.mean()) - (c0.mean() - c1.mean()),
            _means(
                {
                    f"{m}, {e:g} epochs": seeds(m, "adamw", e)
                    for m in (vitp, vitc) for e in (short, long)
                }
            ),
        )  # fmt: skip
        pairs = [(m, o) for m in (vitp, vitc) for o in ("sgd", "adamw")]
        add(
            "optimizer",
            "With the convolutional stem SGD trains ViT about as well as AdamW; with patchify not.",
            "Figure 3",
            "optimizer",
            [seeds(m, o, long) for m, o in pairs],
            lambda ps, pa, cs, ca: abs(ps.mean() - pa.mean()) - abs(cs.mean() - ca.mean()),
            _means({f"{m}, {o}": seeds(m, o, long) for m, o in pairs}),
        )
        add(
            "peak",
            "At equal cost the convolutional stem has the lower error.",
            "Table 2",
            "optimizer",
            [seeds(m, "adamw", long) for m in (vitp, vitc)],
            lambda p, c: p.mean() - c.mean(),
            _means({m: seeds(m, "adamw", long) for m in (vitp, vitc)}),
        )
        for stem in trials.models("seeds", f"{vitc}_s"):
            add(
                f"stem {stem.removeprefix(f'{vitc}_')}",
                f"SGD trains {stem}, another convolutional stem, better than patchify too.",
                "Table 3",
                "stems",
                [seeds(m, "sgd", short) for m in (vitp, stem)],
                lambda p, s: p.mean() - s.mean(),
                _means({m: seeds(m, "sgd", short) for m in (vitp, vitc, stem)}),
            )
        second = lengths[:2][-1]
        add(
            "norm",
            "It is not BatchNorm: with LayerNorm the convolutional stem still beats patchify, "
            "also patchify with BatchNorm and ReLU.",
            "Figure 7",
            "norms",
            [seeds(m, "adamw", second) for m in (vitp, f"{vitp}_bn", f"{vitc}_ln")],
            lambda p, pb, cl: min(p.mean(), pb.mean()) - cl.mean(),
            _means(
                {m: seeds(m, "adamw", second) for m in (vitp, f"{vitp}_bn", vitc, f"{vitc}_ln")}
            ),
        )
    for optimizer in ("adamw", "sgd"):
        for name, better, worse in (("lr and wd", vitc, vitp), ("CNN's lr and wd", cnn, vitp)):
            _add_edf(add, random, f"{name}, {optimizer}", better, worse, optimizer)
    _add_edf(add, random, "depth", f"{vitc}_deep", f"{vitp}_deep", "adamw")
    return found


def _add_edf(add, random, name, better, worse, optimizer):
    groups = [random(better, optimizer), random(worse, optimizer)]
    if not all(map(len, groups)):
        return
    bests = [group.min() for group in groups]
    add(
        name,
        f"Over random learning rates and weight decays {better} is more often near its best than "
        f"{worse} ({optimizer}).",
        *(("Figure 8", "depth") if name == "depth" else ("Figures 4 and 5", "edf")),
        groups,
        lambda b, w: edf_area(b, bests[0]) - edf_area(w, bests[1]),
        {
            f"area under the EDF, {model}": edf_area(group)
            for model, group in zip((better, worse), groups, strict=True)
        },
    )


def _means(groups: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(errors.mean()) for name, errors in groups.items() if len(errors)}


def _bootstrap(groups: Sequence[np.ndarray], statistic) -> tuple[float, float]:
    """95 % interval of a statistic of independent groups."""
    rng = np.random.default_rng(0)
    drawn = [
        statistic(*(rng.choice(group, len(group)) for group in groups))
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
