"""on_gpu.sh: what it asks for, runs and names."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is here")
def test_on_gpu_asks_for_a_gpu(tmp_path):
    env = os.environ | {"PYTHON": sys.executable}
    command = [ROOT / "benchmarks/on_gpu.sh", tmp_path / "results"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "JAX finds no GPU here" in done.stderr
    done = subprocess.run([command[0], "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("All tests and benchmarks") and "set -uo" not in done.stdout
    assert subprocess.run([command[0], "--jason"], capture_output=True).returncode == 2


def test_on_gpu_goes_on_and_names_what_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >>"$0.calls"\ncase "$*" in *vitc_18gf*) exit 3 ;; esac\n'
    )
    python.chmod(0o755)
    command = [ROOT / "benchmarks/on_gpu.sh", tmp_path]
    env = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: vitc_18gf\n" in done.stderr
    calls = (tmp_path / "python.calls").read_text()
    batches = re.findall(r"--models (.*) --batch (\d+) --together 2 --torch_mode", calls)
    assert batches[1] == ("vitc_1gf vitp_1gf", "256") and batches[2] == ("regnety_4gf", "128")
    assert len(batches) == 5 and "benchmarks.population" in calls and "benchmarks.roofline" in calls
    assert f"--json {tmp_path}/train_step_vitc_36gf.json\n" in calls
    assert "--implementations convstem_jax --json" in calls
    (tmp_path / "python.calls").unlink()
    env |= {"PARTS": "vitc_1gf around", "TORCH_MODE": "default", "FLAGS": "--repeats 3"}
    subprocess.run(command, env=env, check=True)
    _, train_step, *around = (tmp_path / "python.calls").read_text().splitlines()
    assert "--models vitc_1gf" in train_step and train_step.endswith(".json --repeats 3")
    assert "--torch_mode default" in train_step and all(
        "benchmarks.around_step" in call for call in around
    )
    env["PARTS"] = "vitc_1gf vitc1gf"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "PARTS has 'vitc1gf', which is not one of" in done.stderr
