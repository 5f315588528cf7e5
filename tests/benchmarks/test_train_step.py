"""Training steps are timed in turns, and those that fail are left out."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks import contenders, train_step
from benchmarks.workload import Case

ROOT = pathlib.Path(__file__).parents[2]


def test_train_step(tmp_path):
    file = tmp_path / "train_step.json"
    flags = ["--models=vitp_tiny", "--batch=4", "--steps=1", "--repeats=3", f"--json={file}"]
    flags += ["--implementations", "convstem_jax", "torchvision", "timm"]
    flags += ["--xla_options", "xla_unheard_of=1"]
    # As a file, which the contenders' processes must find too, and from another folder.
    command = [sys.executable, ROOT / "benchmarks/train_step.py", *flags]
    command += ["--torch_mode=eager", "--matmul_size=64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    rows = json.loads(file.read_text())
    assert [row["implementation"] for row in rows] == ["convstem_jax", "torchvision"]
    for row in rows:
        assert row["images_per_second"] > 0 and row["mfu"] > 0 and row["batch"] == 4
    assert rows[0]["speed_over_its"] == 1
    assert done.stdout.count("vitp_tiny") == 2 and "left out: timm" in done.stderr
    assert "left out: convstem_jax xla_unheard_of=1, vitp_tiny: " in done.stderr


def fake_serve(pipe, case):
    """A contender's process that does what its name says."""
    if case.implementation == "plain Flax, bfloat16":
        os._exit(7)  # while it compiles
    pipe.send((0.1, 0))
    pipe.recv()
    if case.implementation == "timm":
        os._exit(8)
    pipe.send((float("nan") if case.implementation == "plain Flax, float32" else 1.0, 0.1))
    pipe.recv()
    pipe.send((1.0, 0.1))


@pytest.mark.usefixtures("processes_of_one")
@pytest.mark.parametrize("together", [1, 2])
def test_train_step_goes_on_without_those_that_fail(tmp_path, monkeypatch, capsys, together):
    monkeypatch.setattr(contenders, "_serve", fake_serve)
    monkeypatch.setattr(train_step, "missing", lambda *_: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    file = tmp_path / "train_step.json"
    flags = ["--models", "vitp_tiny", "vitc_tiny", "--batch", "4", "2", "--repeats=2"]
    flags += ["--matmul_size=64", "--overlap=1", f"--together={together}", f"--json={file}"]
    flags += ["--steps=4", "--steps_in_a_call=2"]
    assert train_step.main([*flags, "--skip", "*:torchvision", "vitc_*:[!c]*"]) == 1
    rows = json.loads(file.read_text())
    assert [(row["model"], row["implementation"], row["batch"]) for row in rows] == [
        (model, name, batch)
        for model, batch in (("vitp_tiny", 4), ("vitc_tiny", 2))
        for name in ("convstem_jax", "convstem_jax (2 steps a call)")
    ]
    error = capsys.readouterr().err
    assert ("(load 99.0): the ratios will be wrong" in error) == (jax.default_backend() == "cpu")
    for name, reason in (
        ("plain Flax, bfloat16", "its process ended with status 7"),
        ("plain Flax, float32", "its loss is nan"),
        ("timm", "its process ended with status 8"),
    ):
        assert f"left out: {name}, vitp_tiny: {reason}" in error
    second_is_compiled = error.index("vitc_tiny: compiled")
    assert (second_is_compiled < error.index("vitp_tiny: its loss is nan")) is (together == 2)


class FakeContender:
    """Takes the next of `seconds` for each step of a turn."""

    def __init__(self, name, seconds, order):
        self.case = Case("vitp_1gf", name, batch=8)
        self.compile_seconds, self.peak_bytes = 1.0, None
        self._seconds, self._order = iter(seconds), order

    def seconds(self, num_steps):
        self._order.append(self.case.name)
        return next(self._seconds)


def test_medians_ratios_and_mfu():
    order = []
    both = [
        FakeContender("convstem_jax", (1.0, 2.0, 9.0), order),
        FakeContender("timm", (4.0, 4.0, 9.0), order),
    ]
    rows = train_step.rows_of("vitp_1gf", train_step.take_turns(both, 5, 3, None), peak=1e9)
    assert order == ["convstem_jax", "timm", "timm", "convstem_jax", "convstem_jax", "timm"]
    assert [row["images_per_second"] for row in rows] == [8 / 2, 8 / 4]
    assert [row["speed_over_its"] for row in rows] == [1, 2], "medians of 4, 2 and 1"
    # Table 1: 1.1 billion multiply-adds, each of them two operations, three times.
    assert rows[0]["mfu"] == pytest.approx(6 * 1.08e9 * 4 / 1e9, rel=0.01)


def test_what_is_out_of_memory_is_told_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(contenders, "_serve", serve_without_memory)
    flags = ["--models=vitp_tiny", "--implementations=convstem_jax", "--matmul_size=64"]
    assert train_step.main(flags) == 1
    assert "16 GiB (all that take turns share it: lower --batch or" in capsys.readouterr().err


def serve_without_memory(pipe, case):
    """A contender's process for which the device is too small."""
    pipe.send("XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 16 GiB")


def test_train_step_refuses_what_does_not_fit_together(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--models", "vitc_1gf", "vitc_4gf", "vitc_1gf"])
    assert "--models names one twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--models", "vitc_1gf", "vitc_4gf", "--batch", "2", "4", "6"])
    assert "--batch has 3 sizes for 2 models" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--xla_options", "xla_gpu_graph_min_graph_size"])
    assert "is not NAME=VALUE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_step.main(["--steps", "9", "--steps_in_a_call", "4"])
    assert "--steps 9 is no multiple of 4 in a call" in capsys.readouterr().err
