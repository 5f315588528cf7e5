"""A population is timed against runs one after another."""

import json

import jax
import pytest

from benchmarks import population


@pytest.mark.usefixtures("shallow")
def test_population(tmp_path, monkeypatch, capsys):
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    file = tmp_path / "population.json"
    flags = ["--model=vitp_tiny", "--trials=4", "--batch_size=8", "--steps=2", "--repeats=1"]
    assert population.main([*flags, f"--json={file}"]) == 0
    [row] = json.loads(file.read_text())
    assert (row["trials"], row["trials_at_a_time"]) == (4, 2)
    assert row["ratio"] == pytest.approx(row["population_seconds"] / row["runs_seconds"], rel=0.05)
    assert "ratio" in capsys.readouterr().out
