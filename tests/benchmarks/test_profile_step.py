"""The kernels of a step, and the time of each."""

import json
import types

import pytest

from benchmarks import profile_step


@pytest.mark.usefixtures("shallow")
def test_the_kernels_of_a_step(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    flags = ["--model=vitp_tiny", "--batch=8", "--top=2", f"--json={file}"]
    assert profile_step.main(flags) == 0
    rows, output = json.loads(file.read_text()), capsys.readouterr().out
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds, reverse=True) and sum(row["times"] for row in rows) > 50
    assert any("fusion" in row["name"] for row in rows)
    assert f"{len(rows) - 2} others" in output and len(output.splitlines()) == 6
    assert f"{1e3 * sum(seconds):.2f} ms of all threads in" in output
    assert profile_step.main([*flags, "--host"]) == 0
    found = {row["name"]: row["times"] for row in json.loads(file.read_text())}
    assert found["PjitFunction(jit(train_step))"] >= 1
    assert not [name for name in found if name.startswith(("while", "call", "conditional"))]
    assert not found.keys() & {row["name"] for row in rows}
    with pytest.raises(SystemExit):
        profile_step.main(["--model=regnety_tiny", "--implementation=plain Flax, bfloat16"])
    assert "plain Flax, bfloat16 has no regnety_tiny" in capsys.readouterr().err


def test_what_lasts_as_long_as_its_parts_counts_for_the_rest():
    times = [(0, 10), (20, 5), (1, 3), (2, 1), (5, 5), (10, 4)]
    events = [types.SimpleNamespace(start_ns=start, duration_ns=ns) for start, ns in times]
    assert profile_step._own_ns(events) == [2, 5, 2, 1, 5, 4]
