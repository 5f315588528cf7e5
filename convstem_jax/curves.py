"""The curves of a run as a picture."""

import matplotlib.figure

from convstem_jax.errors import writing


def plot_curves(path: str, records: list[dict], title: str) -> None:
    """Draws the training loss and the top-1 errors.

    Args:
        path: of the picture.
        records: of metrics.jsonl.
        title: above both.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, error_axes = figure.subplots(1, 2)
    # Told apart by what they hold: an evaluation may be of a split called "train".
    train = [r for r in records if "loss" in r]
    evals = [r for r in records if "loss" not in r]
    loss_axes.plot([r["epoch"] for r in train], [r["loss"] for r in train], lw=1)
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    for key, style, label in (
        ("ema_top1_error", "C3.-", "EMA"),
        ("raw_top1_error", "C7.--", "without EMA"),
    ):
        errors = [r[key] for r in evals]
        label = f"{label}: {errors[-1]:.2f} %"
        error_axes.plot([r["epoch"] for r in evals], errors, style, label=label)
    error_axes.update_datalim([(0, 0)])  # first, so that a single point has its margin too
    error_axes.autoscale_view()
    error_axes.set(xlabel="epoch", ylabel="top-1 error (%)", xlim=(0, None), ylim=(0, None))
    error_axes.legend(loc="lower left")  # errors fall
    for axes in (loss_axes, error_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with writing(path):
        figure.savefig(path, dpi=120)
