"""What surrounds the steps is timed, each part in a process of its own."""

import json
import os

import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest

from benchmarks import around_step


@pytest.mark.usefixtures("shallow")
def test_around_step(tmp_path, monkeypatch, capsys):
    in_new_processes, kept = [], []

    def in_this_process(function, *args):
        in_new_processes.append(function)
        jax.clear_caches()
        compilation_cache.reset_cache()  # only what is in memory: the files stay
        result = function(*args)
        if function is around_step.compile_seconds:
            kept.append(sorted(os.listdir(args[-1])))
        return result

    monkeypatch.setattr(around_step, "_in_a_new_process", in_this_process)
    file, cache = tmp_path / "around.json", jax.config.jax_compilation_cache_dir
    flags = ["--models=vitp_tiny", "--batch=8", "--steps=2", "--repeats=3", f"--json={file}"]
    try:
        assert around_step.main(flags) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()
    compiling = [around_step.compile_seconds] * 2
    assert in_new_processes == [*compiling, around_step.measure]
    [row] = json.loads(file.read_text())
    assert min(row["mixing_over_step"], row["host_seconds"], row["step_seconds"]) > 0
    assert row["evaluation_over_training_rate"] > 0
    assert row["warm_over_cold"] > 0
    cold, warm = ([x for x in names if x.endswith("-cache")] for names in kept)
    assert cold and cold == warm, "the second compilation found nothing"
    assert np.isfinite(row["save_blocks_seconds"]) and row["save_call_seconds"] > 0
    assert "vitp_tiny" in capsys.readouterr().out


def test_what_is_told_around_the_step():
    train, evaluate, mix = np.array([[2.0, 4.0, 3.0], [1.0, 1.0, 1.0], [0.2, 0.2, 0.6]])
    save = np.array([2 * 5 + 1, 4 * 5 + 3, 3 * 5 + 2])
    found = around_step.medians(train, evaluate, mix, train / 2, save / 100, save, num_steps=5)
    assert found == {
        "step_seconds": 3,
        "host_seconds": 1.5,
        "mixing_over_step": pytest.approx(0.1),
        "evaluation_over_training_rate": 3,
        "save_call_seconds": 0.17,
        "save_blocks_seconds": 2,
    }


def test_what_is_measured_has_a_process_of_its_own():
    found = {around_step._in_a_new_process(os.getpid) for _ in range(2)}
    assert len(found) == 2 and os.getpid() not in found


def test_around_step_goes_on_without_a_model_that_fails(tmp_path, monkeypatch, capsys):
    def in_a_new_process(function, model, *_):
        if model == "vitp_tiny" and function is around_step.measure:
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED\nmore")
        return {"model": model} if function is around_step.measure else 1.0

    monkeypatch.setattr(around_step, "_in_a_new_process", in_a_new_process)
    monkeypatch.setattr(around_step, "table", str)
    file = tmp_path / "around.json"
    assert around_step.main(["--models", "vitp_tiny", "vitc_tiny", f"--json={file}"]) == 1
    assert [row["model"] for row in json.loads(file.read_text())] == ["vitc_tiny"]
    error = capsys.readouterr().err
    assert "left out: vitp_tiny: RuntimeError: CUDNN_STATUS_EXECUTION_FAILED\n" in error
