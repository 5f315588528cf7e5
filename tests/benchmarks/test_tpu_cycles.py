"""The TPU compiler's estimates, each made once."""

import json

import pytest

from benchmarks import tpu_cycles
from tests.marks import needs_libtpu


@pytest.mark.usefixtures("shallow")
@needs_libtpu
def test_tpu_cycles(tmp_path, monkeypatch, capsys):
    """tests/test_preflight.py tests more of the compiler itself."""
    compiled = []

    def compile_step(traced, slice_, *, quick, known):
        if known:
            return known
        compiled.append(str(traced.jaxpr))
        return {"cycles": 10**6 * len(compiled)}

    monkeypatch.setattr(tpu_cycles.tpu, "compile_step", compile_step)
    file = tmp_path / "cycles.json"
    names = ["convstem_jax", "plain Flax, bfloat16"]
    flags = ["--models", "vitp_tiny", "--topology", "v5e:1x1", "--batch=8", f"--json={file}"]
    for _ in range(2):  # An estimate is not made again.
        assert tpu_cycles.main([*flags, "--implementations", *names]) == 0
        assert "1.0 | 2.0 | 0.50" in " ".join(capsys.readouterr().out.split())
    assert [row["implementation"] for row in json.loads(file.read_text())] == names
    ours, plain = compiled
    assert ours != plain, "two networks"


def test_tpu_cycles_refuses_a_file_of_something_else(tmp_path, capsys):
    file = tmp_path / "notes.json"
    file.write_text('{"a": 1}')
    with pytest.raises(SystemExit):
        tpu_cycles.main([f"--json={file}"])
    assert "notes.json holds something else" in capsys.readouterr().err
    assert file.read_text() == '{"a": 1}'
