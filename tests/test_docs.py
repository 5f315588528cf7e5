"""Files and results are as the documentation says, and its notebooks run."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import around_step, input_speed, reading, roofline, tpu_cycles, train_step
from convstem_jax import preflight

ROOT = pathlib.Path(__file__).parent.parent
PERFORMANCE = ROOT / "docs/performance.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_committed_files(page):
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    files = {ROOT / name for name in listed}
    folders = {folder for file in files for folder in file.parents}
    links = re.findall(r"\]\(([^):#]*)(?:#([^)]*))?\)", page.read_text())
    targets = [(page.parent / path if path else page, anchor) for path, anchor in links]
    missing = [path for path, _ in targets if path.resolve() not in files | folders]
    assert not missing
    assert not [
        (path, anchor) for path, anchor in targets if anchor and anchor not in anchors(path)
    ]


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    assert len(titles) == len(set(titles)), page
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_readme_places_every_module():
    package = ROOT / "convstem_jax"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name + "/" for path in package.glob("*/__init__.py")}
    rows = re.search(r"in `convstem_jax/`.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    placed = re.findall(r"`([a-z_]+/?)`", rows[0].partition("\n")[2])
    assert sorted(placed) == sorted(modules)


def test_the_table_of_preflight_is_made_of_its_records():
    lines = (ROOT / "results/preflight/records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    slices = {"v3:2x2", "v4:2x2x4", "v5e:16x16", "v5p:4x4x4", "v6e:8x8"}
    assert len(records) == 40 and {record["topology"] for record in records} == slices
    assert preflight.table(records, "github") in (ROOT / "docs/preflight.md").read_text()


def test_what_a_host_has_to_read_is_of_the_records_of_preflight():
    rows = reading.demand(str(ROOT / "results/preflight/records.jsonl"))
    found = {(row["config"], row["slice"]): list(row.values())[2:] for row in rows}
    for size in ("1gf", "4gf", "18gf", "36gf"):
        slices = ("v5e:16x16", "v4:2x2x4", "v5p:4x4x4", "v6e:8x8")
        cells = [found[f"configs/vitc.py:{size}", slice_] for slice_ in slices]
        line = " | ".join(f"{images:,} images/s, {mb:,} MB/s" for images, mb in cells)
        page = (ROOT / "docs/data_on_a_pod.md").read_text()
        assert f"| {size.upper()} | {line} |\n" in page


@pytest.mark.parametrize("file, compiler", [("records", ""), ("records_jax_0.12", ", JAX 0.12")])
def test_vitc_takes_little_longer_than_vitp_by_preflight(file, compiler):
    lines = (ROOT / f"results/preflight/{file}.jsonl").read_text().splitlines()
    seconds = {(r["topology"], r["config"]): r["step_seconds"] for r in map(json.loads, lines)}
    most, text = {"1gf": 1.12, "4gf": 1.10, "18gf": 1.06, "36gf": 1.02}, ""
    for slice_ in dict.fromkeys(topology for topology, _ in seconds):
        run = "vit{}_{}, adamw, 100 epochs".format
        ratios = [seconds[slice_, run("c", s)] / seconds[slice_, run("p", s)] for s in most]
        text += f"| {slice_}{compiler} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |\n"
        assert all(round(a, 2) <= b for a, b in zip(ratios, most.values(), strict=True))
    assert text in PERFORMANCE.read_text()


def test_the_table_of_cycles_is_made_of_its_estimates():
    rows = json.loads((ROOT / "results/benchmarks/tpu_cycles.json").read_text())
    cycles = {
        (row["model"], row["topology"], row["implementation"]): row["cycles"]
        for row in rows
        if row["batch_on_device"] == 128
    }
    slices, sizes = ("v4:2x2x1", "v5e:2x2", "v6e:2x2"), ("1gf", "4gf", "18gf", "36gf")
    for slice_, size in itertools.product(slices, sizes):
        plain = cycles[f"vitc_{size}", slice_, "plain Flax, bfloat16"]
        assert cycles[f"vitc_{size}", slice_, "convstem_jax"] <= 0.8 * plain
    for size, most in (("1gf", 1.12), ("4gf", 1.10)):
        c, p = (cycles[f"vit{stem}_{size}", "v6e:2x2", "convstem_jax"] for stem in "cp")
        assert c <= most * p
    assert tpu_cycles.table(rows) in PERFORMANCE.read_text()


def test_cycles_of_the_newer_compiler():
    rows = json.loads((ROOT / "results/benchmarks/tpu_cycles_jax_0.12.json").read_text())
    assert {row["versions"]["libtpu"] for row in rows} == {"0.0.50.1"}
    cycles = {(row["model"], row["topology"], row["implementation"]): row["cycles"] for row in rows}
    ratios = [
        cycles[model, topology, "convstem_jax"] / plain
        for (model, topology, name), plain in cycles.items()
        if name == "plain Flax, bfloat16"
    ]
    assert max(ratios) <= 0.8
    told = f"takes {min(ratios):.2f} to {max(ratios):.2f} of plain Flax's cycles in bfloat16"
    assert told in PERFORMANCE.read_text()
    for size, most in (("1gf", 1.12), ("4gf", 1.10), ("36gf", 1.02)):
        c, p = (cycles[f"vit{stem}_{size}", "v6e:2x2", "convstem_jax"] for stem in "cp")
        assert c <= most * p


@pytest.mark.parametrize("device, kind", [("h200", "NVIDIA H200"), ("cpu", "cpu")])
def test_the_tables_of_steps_are_made_of_their_results(device, kind):
    rows = json.loads((ROOT / f"results/benchmarks/train_step_{device}.json").read_text())
    assert {row["device"] for row in rows} == {kind}
    assert train_step.table(rows) in PERFORMANCE.read_text()


def test_the_targets_are_told_of_the_results():
    rows = json.loads((ROOT / "results/benchmarks/train_step_h200.json").read_text())
    found = {(row["model"], row["implementation"]): row for row in rows}

    def cell(size, name, implementation, number):
        row = found.get((f"vitc_{size}", implementation), {}).get(name)
        return "–" if row is None else number(row, size)

    def over_vitp(speed, size):
        return f"{found[f'vitp_{size}', 'convstem_jax']['images_per_second'] / speed:.2f}"

    def ratio(x, _):
        return f"{x:.2f}"

    told = PERFORMANCE.read_text()
    for line in (
        ("speed_over_its", "torchvision", ratio),
        ("mfu", "convstem_jax", lambda x, _: f"{100 * x:.1f}"),
        ("images_per_second", "convstem_jax", over_vitp),
        ("speed_over_its", "plain Flax, bfloat16", ratio),
        ("speed_over_its", "plain Flax, float32", ratio),
    ):
        cells = [cell(size, *line) for size in ("1gf", "4gf", "18gf", "36gf")]
        assert f" | {' | '.join(cells)} |\n" in told


def test_the_bound_and_what_is_around_the_step_are_told_of_their_results():
    bound, *around = (
        json.loads((ROOT / f"results/benchmarks/{name}.json").read_text())
        for name in ("roofline_h200", "around_step_h200", "around_step")
    )
    told = PERFORMANCE.read_text()
    assert roofline.table(bound) in told
    assert around_step.table([*around[0], *around[1]]) in told


def test_the_table_of_processors_is_the_results():
    rows = json.loads((ROOT / "results/input_speed.json").read_text())
    assert input_speed.table(rows) in (ROOT / "docs/data_on_a_pod.md").read_text()


@pytest.mark.parametrize("loaded, restarts", [("0.1", True), (np.__version__, False)])
def test_a_notebook_asks_for_a_restart_where_numpy_was_replaced(tmp_path, loaded, restarts):
    """As in Colab, whose own NumPy the notebook's process has loaded."""
    notebook = json.loads((ROOT / "colab/quickstart.ipynb").read_text())
    code = "import sys, types\nsys.executable = '/bin/true'\n"
    code += f"sys.modules['numpy'] = types.SimpleNamespace(__version__='{loaded}')\n"
    code += notebook["cells"][1]["source"]
    (tmp_path / "convstem_jax").mkdir()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ("Restart session, and run all cells again" in done.stderr) == restarts
    assert done.returncode == restarts


# With less training.
LESS = {
    "epochs=12,eval_every_epochs=1": "epochs=0.1,warmup_epochs=0.05,eval_every_epochs=0.05,"
    "eval_split=test[:500]"
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("colab/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n\n".join(cell["source"] for cell in cells)
    for whole, less in LESS.items():
        assert whole in code
        code = code.replace(whole, less)
    code = code.replace('"runs/', f'"{tmp_path}/')
    # On a screen it would show windows.
    environment = os.environ | {"MPLBACKEND": "agg", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        # Jupyter starts in the notebook's folder.
        [sys.executable, "-c", code], cwd=path.parent, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1 error") >= 2
