"""Reads of files and of a bucket are timed."""

import json

from benchmarks import reading


def test_reading(tmp_path, capsys):
    """docs/data_on_a_pod.md relies on this: the installed reader requests every record anew."""
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
    assert 0 < from_bucket["records_per_second"] < 2 / 0.005 and from_file["records_per_second"] > 0
    assert from_bucket["requests"] == 1 and from_bucket["bytes_sent_per_byte"] >= 1
    [need] = tables["demand"]
    assert tables["about"]["command"] == flags and tables["about"]["versions"]["jax"]
    assert need["images_per_second_and_host"] == 2000 and need["mb_per_second_and_host"] == 230
    assert "v5e:4x4" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [file, preflight], "it cleans up"
