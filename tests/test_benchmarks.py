"""The benchmarks run, and write what they promise."""

import dataclasses
import json

import jax
import pytest

from benchmarks import population, reading
from convstem_jax.models import MODELS


def test_population(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "vitp_tiny", dataclasses.replace(MODELS["vitp_tiny"], depth=1))
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    file = tmp_path / "population.json"
    flags = ["--model=vitp_tiny", "--trials=4", "--batch_size=8", "--steps=2", "--repeats=1"]
    assert population.main([*flags, f"--json={file}"]) == 0
    [row] = json.loads(file.read_text())
    assert (row["trials"], row["trials_at_a_time"]) == (4, 2)
    assert row["ratio"] == pytest.approx(row["population_seconds"] / row["runs_seconds"], rel=0.05)
    assert "ratio" in capsys.readouterr().out


def test_reading(tmp_path, capsys):
    """What docs/data_on_a_pod.md decides by: the installed reader asks anew for every record."""
    preflight = tmp_path / "records.jsonl"
    record = {"spec": "configs/vitc.py", "topology": "v5e:4x4", "hosts": 4}
    records = [record | {"images_per_second": speed} for speed in (8000.0, None)]
    preflight.write_text("".join(json.dumps(r) + "\n" for r in records))
    file = tmp_path / "reading.json"
    flags = ["--records=60", "--reads=30", "--threads", "2", "--latency_ms", "5"]
    flags += [f"--folder={tmp_path}", f"--preflight={preflight}", f"--json={file}"]
    assert reading.main(flags) == 0
    tables = json.loads(file.read_text())
    from_file, from_bucket = tables["reading"]
    assert from_bucket["records_per_second"] < 0.5 * from_file["records_per_second"]
    assert from_bucket["records_per_second"] < 2 / 0.005
    assert from_bucket["requests"] == 1 and from_bucket["bytes_sent_per_byte"] >= 1
    [need] = tables["demand"]
    assert need["images_per_second_and_host"] == 2000 and need["mb_per_second_and_host"] == 230
    assert "v5e:4x4" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [file, preflight], "it cleans up"
