"""Whole runs: interrupted and not, finite and not, on embedded data and on a tiny ImageNet."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from convstem_jax import train as train_module
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.config import load_config, set_field
from convstem_jax.errors import NotFiniteError
from convstem_jax.metrics import read_jsonl

ROOT = pathlib.Path(__file__).parent.parent
# 31 steps with evaluations at 16 and 31, and checkpoints at every fifth step too.
FIELDS = {
    "epochs": "0.2",
    "warmup_epochs": "0.05",
    "eval_every_epochs": "0.1",
    "checkpoint_every_steps": "5",
    "log_every_steps": "4",
    "ema_every": "4",
}


def config(**fields):
    config = load_config("configs/quickstart.py")
    for name, text in (FIELDS | fields).items():
        set_field(config, name, text)
    return config


def run(workdir, signal_at=None, signal_number=None):
    """Runs the command in a process of its own with two devices, until a step or the end."""
    command = [sys.executable, "-m", "convstem_jax.main", "--config", "configs/quickstart.py"]
    command += [f"--config.{name}={text}" for name, text in FIELDS.items()]
    command += ["--workdir", str(workdir)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        output = ""
        for line in process.stdout:
            output += line
            if signal_at and line.startswith("step"):
                step = int(line.split()[1].split("/")[0])
                if step >= signal_at:
                    process.send_signal(signal_number)
                    signal_at = None
    return process.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished run: its folder, its result and what it printed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    status, output = run(workdir)
    assert status == 0, output
    return workdir, json.loads((workdir / "result.json").read_text()), output


def restore_latest(workdir):
    """The latest checkpoint's arrays by name."""
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(str(workdir / "checkpoints"))
    step = checkpoints.latest_step()
    checkpoints.close()
    path = workdir / "checkpoints" / str(step) / "state"
    arrays = jax.tree.leaves_with_path(ocp.StandardCheckpointer().restore(path))
    return step, {jax.tree_util.keystr(name): np.asarray(array) for name, array in arrays}


def without_time(records):
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def test_a_run_leaves_its_records(uninterrupted):
    workdir, result, output = uninterrupted
    for key in (
        "top1_error", "top5_error", "raw_top1_error", "examples", "steps", "seconds",
        "images_per_second", "device", "versions", "commit",
    ):  # fmt: skip
        assert key in result
    assert result["examples"] == 2000 and result["steps"] == 31
    assert 5 < result["top1_error"] < 85, "31 steps must learn something, and not everything"
    assert json.loads((workdir / "config.json").read_text())["lr"] == config().lr
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(workdir.glob("events.out.tfevents.*")), "no TensorBoard file"
    overview = (workdir / "parameters.txt").read_text()
    assert "Total: 238,426" in overview
    assert "yes position_embedding" in overview and "no  norm/scale" in overview

    records = read_jsonl(str(workdir / "metrics.jsonl"))
    steps = {kind: [r["step"] for r in records if r["kind"] == kind] for kind in ("train", "test")}
    assert steps["train"] == [1, *range(4, 31, 4), 31]
    assert steps["test"] == [16, 31]
    assert records[-1]["ema_top1_error"] == result["top1_error"]

    assert re.search(
        r"step 28/31  epoch 0\.2  loss \d\.\d+  [\d,]+ images/s  \d min \d\d s left", output
    )
    assert f"top-1 error {result['top1_error']:.2f} %" in output
    for name in ("result.json", "metrics.jsonl", "curves.png", "checkpoints"):
        assert f"{workdir}/{name}" in output


def test_an_interrupted_run_ends_the_same_to_the_last_bit(uninterrupted, tmp_path):
    status, output = run(tmp_path, 8, signal.SIGTERM)
    assert status == 75, output
    assert "the same command goes on from there" in output
    status, output = run(tmp_path, 20, signal.SIGKILL)
    assert status == -signal.SIGKILL and "resumed from step" in output, output
    status, output = run(tmp_path)
    assert status == 0 and "resumed from step" in output, output

    workdir, result, _ = uninterrupted
    step, expected = restore_latest(workdir)
    resumed_step, resumed = restore_latest(tmp_path)
    assert step == resumed_step == result["steps"]
    assert expected.keys() == resumed.keys() and len(expected) > 300
    differ = [name for name in expected if (expected[name] != resumed[name]).any()]
    assert not differ, f"{len(differ)} arrays differ, first {differ[:3]}"
    records = read_jsonl(str(tmp_path / "metrics.jsonl"))
    assert without_time(records) == without_time(read_jsonl(str(workdir / "metrics.jsonl")))
    resumed_result = json.loads((tmp_path / "result.json").read_text())
    assert resumed_result["top1_error"] == result["top1_error"]


def test_a_finished_run_is_not_trained_again(uninterrupted, capsys):
    workdir, result, _ = uninterrupted
    again = train_module.train(config(), str(workdir))
    assert again["top1_error"] == result["top1_error"]
    assert f"resumed from step {result['steps']}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(NotFiniteError, match="the training loss is (nan|inf)"):
        train_module.train(config(lr="1e20", optimizer="sgd"), str(tmp_path))
    assert not list((tmp_path / "checkpoints").glob("[0-9]*")), "a broken state was saved"


def test_the_loop_fetches_nothing_between_log_points(tmp_path, monkeypatch):
    """On the CPU JAX's guard sees only transfers to the device, so fetches are counted as well."""
    monkeypatch.setattr(train_module.folder, "write_overview", lambda *args: "")  # fetches
    fetches = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetches.append(x) or fetch(x))
    fields = {"log_every_steps": "10", "checkpoint_every_steps": "1000", "eval_every_epochs": "9"}
    train_module.train(config(**fields), str(tmp_path / "a"))
    # Log points 1, 10, 20, 30 and 31, one evaluation, the checksums of one save.
    assert len(fetches) == 5 + 1 + 1

    jit = jax.jit

    def leaky_jit(function, **options):
        step = jit(function, **options)
        if "donate_argnums" not in options:
            return step
        return lambda state, batch, hparams: step(state, fetch(batch), hparams)

    monkeypatch.setattr(jax, "jit", leaky_jit)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_module.train(config(**fields), str(tmp_path / "b"))
