"""The paper's figures (section 5), drawn from a finished study."""

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np

from convstem_jax.study.claims import EDF_RANGE
from convstem_jax.study.experiments import usual_optimizer
from convstem_jax.study.finished import Study
from convstem_jax.study.outcomes import errors, outcomes

TITLES = {"adamw": "AdamW", "sgd": "SGD"}
COLORS = ("#d1495b", "#1f6f9f", "#5a5a5a")  # P, C, CNN


def figures(study: Study) -> dict[str, tuple[matplotlib.figure.Figure, str]]:
    """Figures that the study has trials for: name -> figure and caption."""
    made = set(study.config["experiments"])
    return {
        name: (draw(study), caption)
        for name, (draw, experiments, caption) in _FIGURES.items()
        if made & experiments and (name != "length" or len(study.lengths) > 1)
    }


def _draw_length(study: Study):
    figure, [axes] = _axes(1, (5, 3.6))
    for model, color in zip(study.families, COLORS, strict=True):
        found = _errors_by_length(study, model, usual_optimizer(model))
        _plot_lines(axes, study, [x - found[-1].mean() for x in found], color, model)
    _label_epochs(axes, study, "error − error of the longest (points)")
    return figure


def _draw_optimizer(study: Study):
    figure, [error_axes, gap_axes] = _axes(2, (9, 3.6))
    for model, color in zip(study.families, COLORS, strict=True):
        adamw, sgd = (_errors_by_length(study, model, o) for o in TITLES)
        _plot_lines(error_axes, study, adamw, color, model)
        _plot_lines(error_axes, study, sgd, color, None, "o--")
        pairs = list(zip(sgd, adamw, strict=True))
        gaps = [s.mean() - a.mean() for s, a in pairs]
        noise = [2 * np.hypot(_standard_error(s), _standard_error(a)) for s, a in pairs]
        gap_axes.errorbar(study.lengths, gaps, noise, fmt="o-", capsize=3, color=color, label=model)
    gap_axes.axhline(0, color="0.7", lw=1, zorder=0)
    _label_epochs(error_axes, study, "top-1 error (%)")
    _label_epochs(gap_axes, study, "SGD − AdamW (points)")
    return figure


def _draw_edf(study: Study):
    return _draw_edfs(study, study.families, TITLES)


def _draw_depth(study: Study):
    models = [f"{name}_deep" for name in study.families[:2]]
    return _draw_edfs(study, models, ["adamw"])


def _draw_scatter(study: Study):
    figure, axes = _axes(6, (10, 6), rows=2)
    for i, optimizer in enumerate(TITLES):
        for model, color in zip(study.families, COLORS, strict=True):
            found = study.random(model, optimizer)
            lr, wd, error = (np.array([r[k] for r in found]) for k in ("lr", "wd", "top1_error"))
            diverged = np.array([r["diverged_at"] is not None for r in found], bool)
            for ax, x in zip(axes[3 * i : 3 * i + 3], (lr, wd, lr * wd), strict=True):
                ax.plot(x[~diverged], error[~diverged], ".", color=color, label=model)
                ax.plot(x[diverged], error[diverged], "x", color=color)
        for ax, name in zip(axes[3 * i : 3 * i + 3], ("lr", "wd", "lr · wd"), strict=True):
            ax.set(xscale="log", xlabel=f"{name}, {TITLES[optimizer]}", ylabel="top-1 error (%)")
            ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    labels = axes[0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=len(study.families))
    return figure


def _draw_stems(study: Study):
    p, c, _ = study.families
    names = [p, *reversed(study.models("seeds", f"{c}_s")), c]
    return _draw_models(study, names, study.lengths[0], TITLES)


def _draw_norms(study: Study):
    p, c, _ = study.families
    return _draw_models(study, [p, f"{p}_bn", f"{c}_ln", c], study.second_length, ["adamw"])


def _errors_by_length(study: Study, model: str, optimizer: str) -> list[np.ndarray]:
    return [errors(study.seeds(model, optimizer, epochs)) for epochs in study.lengths]


def _standard_error(x: np.ndarray) -> float:
    return x.std() / np.sqrt(max(1, len(x) - 1))


def _axes(num: int, size: tuple[float, float], rows: int = 1):
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = np.ravel(figure.subplots(rows, num // rows))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _plot_lines(axes, study, found, color, label, style="o-"):
    axes.plot(study.lengths, [x.mean() for x in found], style, color=color, label=label)
    for epochs, x in zip(study.lengths, found, strict=True):
        axes.plot([epochs] * len(x), x, ".", color=color, alpha=0.4)


def _label_epochs(axes, study, label):
    axes.set(xscale="log", xlabel="epochs", ylabel=label)
    axes.set_xticks(study.lengths, [f"{epochs:g}" for epochs in study.lengths])
    axes.minorticks_off()
    axes.legend()


def _draw_edfs(study, models, optimizers):
    figure, axes = _axes(len(optimizers), (4.5 * len(optimizers), 3.6))
    for ax, optimizer in zip(axes, optimizers, strict=True):
        for model, color in zip(models, COLORS, strict=False):
            trials = study.random(model, optimizer)
            above = np.sort(outcomes(trials) - study.best(model, optimizer))
            share = np.arange(1, len(above) + 1) / len(above)
            inside = above <= EDF_RANGE
            x = np.concatenate([[0], above[inside], [EDF_RANGE]])
            y = np.concatenate([[0], share[inside], [inside.mean()]])
            ax.step(x, y, where="post", color=color, label=model)
        ax.set(
            xlim=(0, EDF_RANGE), ylim=(0, 1), title=TITLES[optimizer],
            xlabel="error − the model's best (points)", ylabel="share of settings",
        )  # fmt: skip
    axes[0].legend()
    return figure


def _draw_models(study, names, epochs, optimizers):
    groups = {o: [errors(study.seeds(name, o, epochs)) for name in names] for o in optimizers}
    figure, [axes] = _axes(1, (1.3 * len(names) + 1, 3.6))
    for i, (optimizer, found) in enumerate(groups.items()):
        x = np.arange(len(names)) + 0.3 * (i - (len(groups) - 1) / 2)
        means = [y.mean() for y in found]
        axes.plot(x, means, "_", ms=20, mew=2, color=f"C{i}", label=f"{TITLES[optimizer]}, mean")
        for position, y in zip(x, found, strict=True):
            axes.plot([position] * len(y), y, ".", color=f"C{i}", alpha=0.5)
    axes.set(ylabel=f"top-1 error (%), {epochs:g} epochs", xlim=(-0.5, len(names) - 0.5))
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.legend()
    return figure


_FIGURES = {  # name -> what draws it, any of the experiments that it needs, caption
    "length": (
        _draw_length,
        {"length", "optimizer"},
        "Error minus that of the longest schedule, the usual optimiser of each (Figure 2).",
    ),
    "optimizer": (
        _draw_optimizer,
        {"optimizer"},
        "Error with AdamW (full) and SGD (dashed); the gap between them, with two standard errors "
        "of the seeds on either side (Figure 3).",
    ),
    "edf": (
        _draw_edf,
        {"lr_wd"},
        "Share of random settings within some points of the model's best error (Figures 4, 5).",
    ),
    "lr_wd": (
        _draw_scatter,
        {"lr_wd"},
        "Error against learning rate, weight decay, and their product; x: diverged (Figures 4, 5).",
    ),
    "stems": (_draw_stems, {"stems"}, "Stems, from patchify to convolutional (Table 3)."),
    "norms": (_draw_norms, {"norms"}, "The norm in the stem (Figure 7)."),
    "depth": (
        _draw_depth,
        {"depth"},
        "Share of random settings within some points of the best error, networks four times as "
        "deep (Figure 8).",
    ),
}
