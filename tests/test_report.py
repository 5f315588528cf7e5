"""The report of a made-up study, and its page as a browser shows it."""

import html
import json
import os
import pathlib
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from convstem_jax.study import figures, report
from tests import made_up

MEASURE = """<script>
addEventListener("load", () => {
  const box = x => x.getBoundingClientRect();
  document.title = JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth,
    figures: [...document.querySelectorAll("figure svg")].map(x => [box(x).width, box(x).height]),
    marks: [...document.querySelectorAll("figure svg path, figure svg use")]
      .filter(x => box(x).width + box(x).height > 0).length,
    verdicts: [...document.querySelectorAll("td")]
      .filter(x => x.textContent == "supported").map(x => getComputedStyle(x).color),
    requests: performance.getEntriesByType("resource").map(x => x.name),
  });
});
</script>"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Opens a page with these options; returns what it prints."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        assert not os.environ.get("CI"), ".ci/run should have installed chromium"
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    profile = tmp_path_factory.mktemp("profile")

    def open_page(page, *options):
        fixed = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        done = subprocess.run(
            [program, *fixed, *options, page.as_uri()],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.stdout

    return open_page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    made_up.write(folder)
    return folder


@pytest.fixture(scope="module")
def page(finished):
    assert report.main([str(finished)]) == 0
    return finished / "report" / "index.html"


def test_the_report_holds_figures_tables_and_verdicts(page):
    names = {"length", "optimizer", "edf", "lr_wd", "stems", "norms", "depth"}
    folder = page.parent
    assert {path.stem for path in folder.glob("*.png")} == names
    assert {path.stem for path in folder.glob("*.svg")} == names
    page = page.read_text()
    assert page.count("<svg") == len(names) and "<img" not in page, "it holds everything itself"
    assert "1 x &lt;device&gt;" in page and "60,000 training" in page
    found = json.loads((folder / "verdicts.json").read_text())
    assert len(found) == 14
    for claim in found:
        assert claim["verdict"] == "supported" and claim["interval"][0] > 0
        assert claim["sentence"].replace("'", "&#x27;") in page
        assert claim["sentence"] in (folder / "report.md").read_text()
        assert f"<a href='#{claim['drawing']}'>{claim['figure']}</a>" in page
        assert f"<figure id='{claim['drawing']}'>" in page


def test_an_unfinished_or_damaged_study_has_no_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no finished study" in capsys.readouterr().err
    made_up.write(tmp_path / "study")
    for damage in ('{"kind": "grid"}\n', "[]\n", "{\n"):
        (tmp_path / "study" / "trials.jsonl").write_text(damage)
        assert report.main([str(tmp_path / "study")]) == 2
        assert "holds no finished study" in capsys.readouterr().err


def test_studies_of_the_same_are_reported_as_one(finished, tmp_path, capsys):
    """The other has two more seeds, and the first five again."""
    made_up.write(tmp_path / "other", num_seeds=7)
    folders = [str(finished), str(tmp_path / "other")]
    assert report.main([*folders, "--output", str(tmp_path / "both")]) == 0
    found = json.loads((tmp_path / "both" / "verdicts.json").read_text())
    assert next(claim for claim in found if claim["name"] == "peak")["num_values"] == 7

    made_up.write(tmp_path / "few", num_seeds=3)
    assert report.main([str(tmp_path / "few")]) == 0
    assert "undecided     peak (from 3, of 4 needed)" in capsys.readouterr().out
    assert "| 3, of 4 needed" in (tmp_path / "few/report/report.md").read_text()

    config = json.loads((finished / "config.json").read_text()) | {"batch_size": 7}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert report.main(folders) == 2
    assert "studies differ in batch_size: 256 and 7" in capsys.readouterr().err


def test_studies_of_other_optima_are_not_reported_as_one(finished, tmp_path, capsys):
    """Their random settings lie around other points too."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    trials = [json.loads(line) for line in (other / "trials.jsonl").read_text().splitlines()]
    grid = [trial for trial in trials if trial["kind"] == "grid" and trial["model"] == "vitc_tiny"]
    for trial in grid:
        trial["lr"] *= 4
    kept = [trial for trial in trials if trial["kind"] in ("grid", "random")]
    (other / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in kept))
    assert report.main([str(finished), str(other)]) == 2
    assert "studies have other optima of vitc_tiny with adamw" in capsys.readouterr().err


def test_equal_studies_give_equal_reports(finished, page, tmp_path):
    assert report.main([str(finished), "--output", str(tmp_path)]) == 0
    for path in page.parent.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize("folder", sorted(pathlib.Path("results/study").glob("*/")), ids=str)
def test_committed_verdicts_follow_from_the_committed_trials(folder, tmp_path):
    assert report.main([str(folder), "--output", str(tmp_path)]) == 0
    for name in ("verdicts.json", "report.md"):
        assert (tmp_path / name).read_text() == (folder / "report" / name).read_text()


@pytest.mark.parametrize("width", [500, 1280])
def test_it_shows_every_figure_at_any_width(page, chromium, tmp_path, width):
    measured = tmp_path / "index.html"
    measured.write_text(page.read_text() + MEASURE)
    shown = chromium(measured, "--dump-dom", f"--window-size={width},900")
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    assert found["overflow"] <= 0, "the page scrolls sideways"
    assert len(found["figures"]) == 7
    for shown_width, height in found["figures"]:
        assert 0.5 * min(width, 800) < shown_width <= width and height > 100
    assert found["marks"] > 1000
    assert found["verdicts"] == ["rgb(26, 127, 55)"] * 14
    assert found["requests"] == [], "it needs something else"


def test_it_draws_each_model_in_its_colour(page, chromium, tmp_path):
    picture = tmp_path / "page.png"
    chromium(page, f"--screenshot={picture}", "--window-size=1280,6000", "--hide-scrollbars")
    image = cv2.imread(str(picture))[..., ::-1].astype(int)
    for colour in figures.COLORS:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(image - rgb).max(-1) < 8).sum() > 500, colour
