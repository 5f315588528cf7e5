"""Figures, tables and verdicts of finished studies.

Writes the paper's figures (PNG and SVG), report.md, verdicts.json, and index.html, which holds
everything in one file, to the folder `report` of the first study, or to --output.
"""

import dataclasses
import html
import itertools
import os
import sys

import matplotlib
import numpy as np
from tabulate import tabulate

from convstem_jax import files
from convstem_jax.errors import UserError
from convstem_jax.study.claims import Claim, claims
from convstem_jax.study.figures import TITLES, figures
from convstem_jax.study.finished import Study, read
from convstem_jax.study.optima import chosen_again, settings_of
from convstem_jax.study.outcomes import FAILED, errors, num_diverged, outcomes
from convstem_jax.terminal import new_parser, tell

VERDICT_COLORS = {"supported": "#1a7f37", "not supported": "#b3261e", "undecided": "#8a6d00"}


# -------------------------------------------------------------------------------------- tables


def error_table(study: Study) -> list[list[str]]:
    """Mean error and range of the seeds, for each model, optimiser and length."""

    def cell(trials):
        if not trials:
            return "–"
        x, diverged = errors(trials), num_diverged(trials)
        text = f"{x.mean():.2f} ({x.min():.2f} – {x.max():.2f})"
        return f"{text}, {diverged} diverged" if diverged else text

    rows = []
    for model in study.models("seeds"):
        for optimizer in TITLES:
            found = [study.seeds(model, optimizer, epochs) for epochs in study.lengths]
            if any(found):
                rows.append([model, TITLES[optimizer], *map(cell, found)])
    return [["model", "optimiser", *(f"{epochs:g} epochs" for epochs in study.lengths)], *rows]


def random_table(study: Study) -> list[list[str]]:
    """How good random settings are (section 5.3)."""
    rows = []
    for model in study.models("random"):
        for optimizer in TITLES:
            trials = study.random(model, optimizer)
            if trials:
                optimum = study.optimum(model, optimizer)
                around = "{:.2g}, {:.2g}".format(*optimum) if optimum else "–"
                edge = " *" if study.on_edge(model, optimizer) else ""
                grid = study.grid(model, optimizer)
                again = chosen_again(grid) if grid else None
                seeds = errors(study.seeds(model, optimizer, study.lengths[0]))
                best = study.best(model, optimizer)
                above = outcomes(trials) - best
                rows.append([
                    model, TITLES[optimizer], around + edge,
                    "–" if again is None else f"{again:.0%}",
                    f"{seeds.std(ddof=1):.2f}" if len(seeds) > 1 else "–",
                    f"{best:.2f}" if best else "–", f"{np.median(errors(trials)):.2f}",
                    *(f"{np.mean(above <= points):.0%}" for points in (1, 4)),
                    f"{num_diverged(trials)} of {len(trials)}",
                ])  # fmt: skip
    headers = ["model", "optimiser", "optimum's lr, wd", "chosen again", "seeds deviate by", "best"]
    return [[*headers, "median", "within 1 point", "within 4 points", "diverged"], *rows]


def claim_table(found: list[Claim]) -> list[list[str]]:
    """A row for each claim."""
    rows = [["claim", "paper", "our numbers", "advantage (95 %)", "from", "verdict"]]
    for claim in found:
        numbers = "; ".join(
            f"{name} {value:.2f}{' *' if name in claim.on_edge else ''}"
            for name, value in claim.numbers.items()
        )
        interval = "–" if claim.interval is None else "{:.2f} … {:.2f}".format(*claim.interval)
        advantage = f"{claim.advantage:.2f} ({interval})"
        trials = str(claim.num_values)
        if claim.num_values < claim.min_values:
            trials += f", of {claim.min_values} needed"
        if claim.num_diverged:
            trials += f", {claim.num_diverged} diverged"
        rows.append([claim.sentence, claim.figure, numbers, advantage, trials, claim.verdict])
    return rows


def conditions(study: Study) -> list[str]:
    """Where the numbers come from and what they mean, in paragraphs."""
    first = study.results[0]
    versions = ", ".join(f"{name} {v}" for name, v in first["versions"].items())
    seconds = sum(result["seconds"] for result in study.results)
    devices, commits = (
        " and ".join(sorted({str(result[name]) for result in study.results}))
        for name in ("device", "commit")
    )
    tuned = "leave out the choice of each optimum"
    pairs = itertools.product(study.families, TITLES)
    sizes = sorted({len(settings_of(study.grid(*pair))) for pair in pairs} - {0})
    if sizes:
        tuned += (
            f", from coarse grids of {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} "
            f"settings (seeds of each: {study.config['grid_seeds']}): below is how often other "
            "seeds would choose it again, by the bootstrap. Where it lies on the grid's edge, and "
            "is better than what is beside it by more than a standard error of the seeds (*), a "
            "better one may lie outside. Variants have the optimum of the model that they are of"
        )
    if study.config["intervals"] == "own":
        tuned += (
            ". Random settings lie around each model's own optimum, where the paper draws those of "
            "all ViTs from one interval; each is one seed, so what seeds deviate by is in the EDFs"
        )
    return [
        f"{len(study.trials)} trials on {first['train_examples']:,} training and "
        f"{first['eval_examples']:,} test images of {study.config['dataset']}, at "
        f"{study.config['image_size']} pixels; {devices}, {seconds / 60:.0f} minutes; {versions}; "
        f"commit {commits}.",
        "Learning rates and weight decays are chosen by the error on the test images, as in the "
        "paper. All trials read the same batches in the same order: seeds differ in their initial "
        "weights, and in what mixes images where that is used. The 95 % intervals are over seeds, "
        "or over random settings, for these test images and this order; they are not corrected for "
        f"the number of claims, and {tuned}. A trial that diverged keeps its last error in "
        f"figures and tables, and counts as {FAILED:g} % in the claims.",
    ]


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
    # Equal studies give equal files.
    drawn, svgs = figures(study), {}
    matplotlib.rcParams["svg.hashsalt"] = "convstem_jax"
    for name, (figure, _) in drawn.items():
        figure.savefig(os.path.join(output, f"{name}.png"), dpi=150)
        path = os.path.join(output, f"{name}.svg")
        figure.savefig(path, metadata={"Date": None})
        with open(path) as file:
            svgs[name] = file.read()
    found = claims(study)
    verdicts = [dataclasses.asdict(claim) | {"verdict": claim.verdict} for claim in found]
    files.write_json(os.path.join(output, "verdicts.json"), verdicts)
    tables = {
        "Claims": claim_table(found),
        "Random learning rates and weight decays": random_table(study),
        "Errors at the optimum: mean (range over seeds)": error_table(study),
    }
    tables = {title: table for title, table in tables.items() if len(table) > 1}
    sections = ["# Stability study", *conditions(study)]
    for title, (headers, *rows) in tables.items():
        sections += [f"## {title}", tabulate(rows, headers, "github", disable_numparse=True)]
    for name, (_, caption) in drawn.items():
        sections += [f"![{caption}]({name}.png)", caption]
    files.write(os.path.join(output, "report.md"), "\n\n".join(sections) + "\n")
    page = _page(study, tables, found, drawn, svgs)
    files.write(os.path.join(output, "index.html"), page)
    return found


def _page(study, tables, found, drawn, svgs) -> str:
    ours = {claim.figure: claim.drawing for claim in found if claim.drawing in drawn}

    def cell(text):
        shown = html.escape(text)
        if text in ours:
            shown = f"<a href='#{ours[text]}'>{shown}</a>"
        return f"<td style='color:{VERDICT_COLORS.get(text, 'inherit')}'>{shown}</td>"

    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Stability study</title>",
        "<meta name='viewport' content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>Stability study</h1>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in conditions(study)),
    ]
    for title, (headers, *rows) in tables.items():
        parts.append(f"<h2>{html.escape(title)}</h2><div class='wide'><table>")
        parts.append(f"<tr>{''.join(f'<th>{html.escape(header)}</th>' for header in headers)}</tr>")
        parts += [f"<tr>{''.join(map(cell, row))}</tr>" for row in rows]
        parts.append("</table></div>")
    for name, (_, caption) in drawn.items():
        svg = svgs[name][svgs[name].index("<svg") :]
        parts.append(
            f"<figure id='{name}'>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "\n".join([*parts, "</html>", ""])


def main(argv: list[str] | None = None) -> int:
    """Writes the report; returns the exit status."""
    parser = new_parser("convstem_jax.study.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished study")
    parser.add_argument("--output", help="folder to write to (default: RUN/report of the first)")
    args = parser.parse_args(argv)
    output = args.output or os.path.join(args.runs[0], "report")
    try:
        found = write(read(args.runs), output)
    except (UserError, OSError) as error:
        return tell(error)
    for claim in found:
        few = f" (from {claim.num_values}, of {claim.min_values} needed)"
        print(f"{claim.verdict:14}{claim.name}{few * (claim.num_values < claim.min_values)}")
    print(f"report: {output}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
