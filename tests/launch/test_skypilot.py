"""launch/skypilot.yaml."""

import re
import subprocess

import pytest
import yaml

from tests.launch.cloud import LAUNCH, tool


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["file_mounts"]["/mnt/data"] == "gs://${BUCKET}/data", "copied, not mounted"
    # Fields of SkyPilot 0.14's schema; it refuses others.
    assert set(task) <= {
        "name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run",
    }  # fmt: skip
    assert set(task["resources"]) <= {"accelerators", "use_spot", "disk_size", "job_recovery"}
    recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert task["resources"]["job_recovery"] == recovery
    for part in ("setup", "run"):
        # Names in capitals come from outside.
        command = [tool("shellcheck"), "--shell=bash", "--exclude=SC2153", "-"]
        done = subprocess.run(command, input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        used = set(re.findall(r"\$\{?([A-Z_]+)", task[part]))
        assert {name for name in used if not name.startswith("SKYPILOT_")} <= set(task["envs"])


@pytest.fixture
def node(tmp_path):
    """A function that runs the task on one of two nodes, with `program` in place of Python."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)

    def run(program, **envs):
        python.write_text(f"#!/bin/bash\n{program}\n")
        python.chmod(0o755)
        nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
        env = {"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_RANK": "1", **nodes, **task["envs"], **envs}
        script = task["run"].replace("/mnt/bucket", str(tmp_path / "bucket"))
        command = ["bash", "-c", script]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_skypilot_starts_the_program(node, tmp_path, device):
    done = node('printf "%s\\n" "$@"', BUCKET="b", FIELDS="lr=1 wd=2", DEVICE=device)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:4] == ["-m", "convstem_jax.main", "--config", "configs/vitc.py:4gf"]
    assert {"--config.lr=1", "--config.wd=2", f"{tmp_path}/bucket/runs/convstem"} <= set(words)
    told = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]
    assert words[-6:] == told if device == "gpu" else "--coordinator" not in words


def test_skypilot_gives_up_without_progress(node, tmp_path):
    """A new checkpoint resets the count; so does giving up, as a person then starts it again."""
    statuses = []
    for step in ("", "100", "", "", "", ""):
        folder = f"bucket/runs/convstem/checkpoints/{step}"
        save = f"mkdir -p {folder}; touch {folder}/commit_success.txt" if step else ""
        statuses.append(node(f"{save}\nexit 75", BUCKET="b").returncode)
    assert statuses == [75, 75, 75, 75, 1, 75]
    assert node("exit 3", BUCKET="b").returncode == 3
    assert not list((tmp_path / "bucket/runs/convstem").glob(".failures*"))
