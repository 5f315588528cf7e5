"""Figures, tables and verdicts of finished studies.

Writes the paper's figures (PNG and SVG), report.md, verdicts.json, and index.html, which holds
everything in one file, to the folder `report` of the first study, or to --output.
"""

import argparse
import dataclasses
import html
import json
import os
import sys

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from tabulate import tabulate

from convstem_jax.errors import ConfigError, UserError
from convstem_jax.study.claims import EDF_RANGE, Claim, Trials, claims
from convstem_jax.study.experiments import usual_optimizer

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
COLORS = ("#d1495b", "#1f6f9f", "#5a5a5a")  # P, C, CNN
VERDICT_COLORS = {"supported": "#1a7f37", "not supported": "#b3261e", "undecided": "#8a6d00"}


@dataclasses.dataclass(frozen=True)
class Study:
    """A finished study: its configuration, its result.json and its trials."""

    config: dict
    result: dict
    trials: Trials

    @property
    def families(self) -> tuple[str, str, str]:
        """Names of P, C and the CNN."""
        return self.config["vitp"], self.config["vitc"], self.config["cnn"]


def read(folders: list[str]) -> Study:
    """Reads studies of the same models on the same data, as one.

    Raises:
        ConfigError: one is not finished, or they do not belong together.
    """
    configs, results, records = [], [], []
    for folder in folders:
        try:
            with open(os.path.join(folder, "config.json")) as file:
                configs.append(json.load(file))
            with open(os.path.join(folder, "result.json")) as file:
                results.append(json.load(file))
            with open(os.path.join(folder, "trials.jsonl")) as file:
                records += [json.loads(line) for line in file]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no finished study: {error}") from error
    for name in ("vitp", "vitc", "cnn", "dataset", "train_split", "eval_split"):
        values = {str(config.get(name)) for config in configs}
        if len(values) > 1:
            raise ConfigError(f"studies differ in {name}: {' and '.join(sorted(values))}")
    return Study(configs[0], results[0], Trials(records))


# ------------------------------------------------------------------------------------- figures


def figures(study: Study) -> dict[str, tuple[matplotlib.figure.Figure, str]]:
    """Figures that the study has trials for: name -> figure and caption."""
    drawn = {}
    for name, draw in {
        "length": draw_length,
        "optimizer": draw_optimizer,
        "edf": draw_edf,
        "lr_wd": draw_scatter,
        "stems": draw_stems,
        "norms": draw_norms,
        "depth": draw_depth,
    }.items():
        if (figure := draw(study)) is not None:
            caption = draw.__doc__.splitlines()[0]
            drawn[name] = figure, caption
    return drawn


def draw_length(study: Study):
    """Error minus that of the longest schedule, the usual optimiser of each (Figure 2)."""
    lengths = study.trials.epochs("seeds")
    if len(lengths) < 2:
        return None
    figure, [axes] = _axes(1, (5, 3.6))
    for model, color in zip(study.families, COLORS, strict=True):
        optimizer = usual_optimizer(model)
        errors = [seeds(study, model, optimizer, epochs) for epochs in lengths]
        _plot_lines(axes, lengths, [x - errors[-1].mean() for x in errors], color, model)
    _label_epochs(axes, lengths, "error − error of the longest (points)")
    return figure


def draw_optimizer(study: Study):
    """Error with AdamW (full) and SGD (dashed), and the gap between them (Figure 3)."""
    lengths = study.trials.epochs("seeds")
    if not lengths or not len(seeds(study, study.families[0], "sgd", lengths[-1])):
        return None
    figure, [error_axes, gap_axes] = _axes(2, (9, 3.6))
    for model, color in zip(study.families, COLORS, strict=True):
        of = {o: [seeds(study, model, o, epochs) for epochs in lengths] for o in OPTIMIZERS}
        _plot_lines(error_axes, lengths, of["adamw"], color, model)
        _plot_lines(error_axes, lengths, of["sgd"], color, None, "o--")
        gaps = [s - a.mean() for s, a in zip(of["sgd"], of["adamw"], strict=True)]
        _plot_lines(gap_axes, lengths, gaps, color, model)
    gap_axes.axhline(0, color="0.7", lw=1, zorder=0)
    _label_epochs(error_axes, lengths, "top-1 error (%)")
    _label_epochs(gap_axes, lengths, "SGD − AdamW (points)")
    return figure


def draw_edf(study: Study):
    """Share of random settings within some points of the model's best error (Figures 4, 5)."""
    return _draw_edfs(study, study.families, OPTIMIZERS)


def draw_depth(study: Study):
    """The same for networks four times as deep (Figure 8)."""
    return _draw_edfs(study, [f"{name}_deep" for name in study.families[:2]], ["adamw"])


def draw_scatter(study: Study):
    """Error against learning rate, weight decay, and their product (Figures 4, 5)."""
    if not study.trials.models("random"):
        return None
    figure, axes = _axes(6, (10, 6), rows=2)
    for i, optimizer in enumerate(OPTIMIZERS):
        for model, color in zip(study.families, COLORS, strict=True):
            found = study.trials.select(kind="random", model=model, optimizer=optimizer)
            lr, wd, error = (np.array([r[k] for r in found]) for k in ("lr", "wd", "top1_error"))
            for ax, x in zip(axes[3 * i : 3 * i + 3], (lr, wd, lr * wd), strict=True):
                ax.plot(x, error, ".", color=color, label=model)
        for ax, name in zip(axes[3 * i : 3 * i + 3], ("lr", "wd", "lr · wd"), strict=True):
            ax.set(
                xscale="log", xlabel=f"{name}, {OPTIMIZERS[optimizer]}", ylabel="top-1 error (%)"
            )
            ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes[0].legend()
    return figure


def draw_stems(study: Study):
    """Stems, from patchify to convolutional (Table 3)."""
    p, c, _ = study.families
    names = [p, *reversed(study.trials.models("seeds", f"{c}_s")), c]
    return _draw_bars(study, names, study.trials.epochs("seeds")[:1], OPTIMIZERS)


def draw_norms(study: Study):
    """The norm in the stem (Figure 7)."""
    p, c, _ = study.families
    names = [p, f"{p}_bn", f"{c}_ln", c]
    return _draw_bars(study, names, study.trials.epochs("seeds")[1:2], ["adamw"])


def seeds(study: Study, model: str, optimizer: str, epochs: float) -> np.ndarray:
    """Errors of a model's seeds at its own optimum."""
    return study.trials.errors(kind="seeds", model=model, optimizer=optimizer, epochs=epochs)


def _axes(num: int, size: tuple[float, float], rows: int = 1):
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = np.ravel(figure.subplots(rows, num // rows))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _plot_lines(axes, lengths, errors, color, label, style="o-"):
    known = [(epochs, x) for epochs, x in zip(lengths, errors, strict=True) if len(x)]
    axes.plot([e for e, _ in known], [x.mean() for _, x in known], style, color=color, label=label)
    for epochs, x in known:
        axes.plot([epochs] * len(x), x, ".", color=color, alpha=0.4)


def _label_epochs(axes, lengths, label):
    axes.set(xscale="log", xlabel="epochs", ylabel=label)
    axes.set_xticks(lengths, [f"{e:g}" for e in lengths])
    axes.minorticks_off()
    axes.legend()


def _draw_edfs(study, models, optimizers):
    if not any(model in study.trials.models("random") for model in models):
        return None
    figure, axes = _axes(len(optimizers), (4.5 * len(optimizers), 3.6))
    for ax, optimizer in zip(axes, optimizers, strict=True):
        for model, color in zip(models, COLORS, strict=False):
            errors = np.sort(study.trials.errors(kind="random", model=model, optimizer=optimizer))
            if len(errors):
                x = np.concatenate([[0], errors - errors[0], [EDF_RANGE]])
                share = np.concatenate([[0], np.arange(1, len(errors) + 1) / len(errors)])
                y = np.concatenate([share, [np.mean(errors - errors[0] <= EDF_RANGE)]])
                inside = x <= EDF_RANGE
                ax.step(x[inside], y[inside], where="post", color=color, label=model)
        ax.set(
            xlim=(0, EDF_RANGE), ylim=(0, 1), title=OPTIMIZERS[optimizer],
            xlabel="error − the model's best (points)", ylabel="share of settings",
        )  # fmt: skip
    axes[0].legend()
    return figure


def _draw_bars(study, names, epochs, optimizers):
    groups = {
        o: [seeds(study, name, o, epochs[0]) if epochs else np.array([]) for name in names]
        for o in optimizers
    }
    if min(len(x) for found in groups.values() for x in found) == 0 or len(names) < 3:
        return None
    figure, [axes] = _axes(1, (1.3 * len(names) + 1, 3.6))
    for i, (optimizer, found) in enumerate(groups.items()):
        x = np.arange(len(names)) + 0.4 * (i - (len(groups) - 1) / 2)
        means = [errors.mean() for errors in found]
        axes.bar(x, means, 0.38, color=f"C{i}", alpha=0.6, label=OPTIMIZERS[optimizer])
        for position, errors in zip(x, found, strict=True):
            axes.plot([position] * len(errors), errors, ".", color=f"C{i}")
    lowest = min(errors.min() for found in groups.values() for errors in found)
    axes.set(ylabel=f"top-1 error (%), {epochs[0]:g} epochs", ylim=(0.8 * lowest, None))
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.legend()
    return figure


# -------------------------------------------------------------------------------------- tables


def error_table(study: Study) -> list[list[str]]:
    """Mean error and range of the seeds, for each model, optimiser and length."""
    rows = []
    lengths = study.trials.epochs("seeds")
    for model in study.trials.models("seeds"):
        for optimizer in OPTIMIZERS:
            found = [seeds(study, model, optimizer, epochs) for epochs in lengths]
            if any(map(len, found)):
                cells = [
                    f"{x.mean():.2f} ({x.min():.2f} – {x.max():.2f})" if len(x) else "–"
                    for x in found
                ]
                rows.append([model, OPTIMIZERS[optimizer], *cells])
    return [["model", "optimiser", *(f"{epochs:g} epochs" for epochs in lengths)], *rows]


def claim_table(found: list[Claim]) -> list[list[str]]:
    """A row for each claim."""
    rows = [["claim", "paper", "our numbers", "advantage (95 %)", "from", "verdict"]]
    for claim in found:
        interval = "–" if claim.interval is None else "{:.2f} … {:.2f}".format(*claim.interval)
        numbers = "; ".join(f"{name} {value:.2f}" for name, value in claim.numbers.items())
        advantage = f"{claim.advantage:.2f} ({interval})"
        rows.append(
            [claim.sentence, claim.figure, numbers, advantage, str(claim.num_values), claim.verdict]
        )
    return rows


def conditions(study: Study) -> str:
    """Where the numbers come from, in one paragraph."""
    result = study.result
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    return (
        f"{len(study.trials.records)} trials on {result['train_examples']:,} training and "
        f"{result['eval_examples']:,} test images of {study.config['dataset']}, at "
        f"{study.config['image_size']} pixels; {result['device']}, {result['seconds'] / 60:.0f} "
        f"minutes; {versions}; commit {result['commit']}."
    )


# ---------------------------------------------------------------------------------------- page

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 0.9rem } figure { margin: 2rem 0 }
td, th { text-align: left; vertical-align: top }
td, th { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd }
.wide { overflow-x: auto }
figure svg { max-width: 100%; height: auto } figcaption { color: #555 }
"""


def write(study: Study, output: str) -> list[Claim]:
    """Writes the whole report to the folder `output`, and returns the claims."""
    os.makedirs(output, exist_ok=True)
    drawn, svgs = figures(study), {}
    for name, (figure, _) in drawn.items():
        figure.savefig(os.path.join(output, f"{name}.png"), dpi=150)
        path = os.path.join(output, f"{name}.svg")
        figure.savefig(path, metadata={"Date": None})
        with open(path) as file:
            svgs[name] = file.read()
    found = claims(study.trials, *study.families)
    with open(os.path.join(output, "verdicts.json"), "w") as file:
        json.dump(
            [dataclasses.asdict(claim) | {"verdict": claim.verdict} for claim in found],
            file, indent=2,
        )  # fmt: skip
        file.write("\n")
    tables = {"Claims": claim_table(found), "Errors (%)": error_table(study)}
    with open(os.path.join(output, "report.md"), "w") as file:
        file.write(f"# Stability study\n\n{conditions(study)}\n")
        for title, (headers, *rows) in tables.items():
            table = tabulate(rows, headers, "github", disable_numparse=True)
            file.write(f"\n## {title}\n\n{table}\n")
        for name, (_, caption) in drawn.items():
            file.write(f"\n![{caption}]({name}.png)\n\n{caption}\n")
    with open(os.path.join(output, "index.html"), "w") as file:
        file.write(_page(study, tables, drawn, svgs))
    return found


def _page(study, tables, drawn, svgs) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Stability study</title>",
        f"<style>{_STYLE}</style><h1>Stability study</h1><p>{html.escape(conditions(study))}</p>",
    ]
    for title, (headers, *rows) in tables.items():
        parts.append(f"<h2>{html.escape(title)}</h2><div class='wide'><table><tr>")
        parts += [f"<th>{html.escape(header)}</th>" for header in headers]
        for row in rows:
            cells = "".join(
                f"<td style='color:{VERDICT_COLORS.get(cell, 'inherit')}'>{html.escape(cell)}</td>"
                for cell in row
            )
            parts.append(f"<tr>{cells}</tr>")
        parts.append("</table></div>")
    for name, (_, caption) in drawn.items():
        svg = svgs[name][svgs[name].index("<svg") :]
        parts.append(
            f"<figure id='{name}'>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "\n".join([*parts, "</html>", ""])


def main(argv: list[str] | None = None) -> int:
    """Writes the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m convstem_jax.study.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished study")
    parser.add_argument("--output", help="folder to write to (default: RUN/report of the first)")
    args = parser.parse_args(argv)
    output = args.output or os.path.join(args.runs[0], "report")
    try:
        found = write(read(args.runs), output)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 2)
    for claim in found:
        print(f"{claim.verdict:14}{claim.name}")
    print(f"report: {output}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
