"""Records of a run: their speed, their lateness, and what a resumed run keeps."""

import errno
import json
import os
import resource

import jax.numpy as jnp
from matplotlib.figure import Figure
import pytest

from convstem_jax import metrics
from convstem_jax.curves import plot_curves
from convstem_jax.errors import CheckpointError, NotFiniteError, StorageError


@pytest.fixture
def clock_at(monkeypatch):
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_speed_leaves_out_compilation_and_pauses(clock_at):
    clock = metrics._Clock()
    assert (clock.steps_per_second, clock.time_left(10)) == (0.0, "?")
    clock_at(100)  # compiled
    clock.tick(1)
    clock_at(105)
    clock.tick(11)
    assert clock.steps_per_second == 2.0
    clock_at(107.5)
    with clock.pause(16):
        clock_at(137.5)  # an evaluation
    clock_at(142.5)
    clock.tick(26)
    assert clock.steps_per_second == 2.0
    # 25 steps took 12.5 s of training and 30 s of evaluation, which will recur.
    assert clock.time_left(50) == "1 min 25 s"
    assert clock.time_left(25 * 200) == "2 h 21 min"
    resumed = metrics._Clock(clock.steps, clock.seconds, clock.paused)
    assert resumed.time_left(50) == "1 min 25 s"


def records_of(workdir, first_step=0):
    return metrics.Records(
        str(workdir), first_step=first_step, num_steps=50, steps_per_epoch=10, batch_size=64
    )


def step_metrics(loss):
    return {"loss": jnp.float32(loss), "lr": jnp.float32(0.1)}


def test_training_metrics_are_written_one_log_point_late(tmp_path, capsys, clock_at):
    records = records_of(tmp_path)
    records.train(1, step_metrics(2.5))
    assert not metrics.read_jsonl(records.path), "writing it would wait for a step that still runs"
    clock_at(10)
    records.train(21, step_metrics(2.25))
    (record,) = metrics.read_jsonl(records.path)
    assert (record["step"], record["epoch"], record["loss"]) == (1, 0.1, 2.5)
    with records.pause(21, {}):
        clock_at(100)
    record = metrics.read_jsonl(records.path)[-1]
    assert (record["step"], record["images_per_second"]) == (21, 20 / 10 * 64)
    assert "step 21/50  epoch 2.1  loss 2.2500  128 images/s  0 min 14 s left" in (
        capsys.readouterr().out
    )
    records.close()
    assert records.images_per_second == 128


def test_records_reach_the_disk_before_a_checkpoint(tmp_path, monkeypatch):
    """A machine that is lost after a checkpoint must not leave a gap in metrics.jsonl."""
    synced = []
    records = records_of(tmp_path)
    text = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(metrics.os, "fsync", lambda unused_file: synced.append(text.read_text()))
    records.train(7, step_metrics(2.5))
    with records.pause(7, {}):
        assert len(synced) == 1 and '"step": 7' in synced[0]
    records.close()


def test_steps_that_wait_for_input_are_told(tmp_path, capsys, clock_at):
    class Running:
        def is_ready(self):
            return False

    records = records_of(tmp_path)
    records.batch_arrived(None)
    records.train(1, step_metrics(2.0))
    clock_at(10)
    for before in (step_metrics(2.0), {"loss": Running()}, {"loss": Running()}):
        records.batch_arrived(before)
    records.train(4, step_metrics(2.0))
    with records.pause(4, {}):
        pass
    assert metrics.read_jsonl(records.path)[-1]["starved"] == pytest.approx(1 / 3)
    assert "33% of the steps waited for input" in capsys.readouterr().out
    for before in (step_metrics(2.0), {"loss": Running()}):  # the first comes after a pause
        records.batch_arrived(before)
    records.train(6, step_metrics(2.0))
    records.flush()
    assert metrics.read_jsonl(records.path)[-1]["starved"] == 0
    records.close()


def test_an_evaluation_may_be_of_the_training_split(tmp_path):
    records = records_of(tmp_path)
    records.train(50, step_metrics(2.0))
    records.flush()
    error = {"top1_error": 50.0, "examples": 2}
    records.eval(50, "train", {"ema": error, "raw": error})
    records.close()
    written = metrics.read_jsonl(records.path)
    plot_curves(str(tmp_path / "curves.png"), written, "title")
    assert (tmp_path / "curves.png").exists()
    records_of(tmp_path, first_step=50).close()
    assert metrics.read_jsonl(records.path) == written[:1], "the last evaluation is made again"


def test_a_single_evaluation_has_its_margin(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    records = [{"epoch": 2.0, "loss": 1.0}]
    records += [{"epoch": 2.0, "ema_top1_error": 24.75, "raw_top1_error": 25.45}]
    plot_curves(str(tmp_path / "curves.png"), records, "title")
    bottom, top = drawn[0].axes[1].get_ylim()
    assert bottom == 0 and top > 26


@pytest.mark.parametrize(
    "code, kind, words",
    [(errno.ENOSPC, CheckpointError, "make room"), (errno.EIO, StorageError, "the same command")],
)
def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch, code, kind, words):
    records = records_of(tmp_path)
    records.train(1, step_metrics(2.0))
    error = OSError(code, os.strerror(code))
    monkeypatch.setattr(metrics.os, "fsync", lambda unused_file: (_ for _ in ()).throw(error))
    match = rf"metrics.jsonl cannot be written.*{os.strerror(code)}\): {words}"
    with pytest.raises(kind, match=match):
        with records.pause(1, {}):
            raise AssertionError("the checkpoint would outlive the records before it")
    records.close()


def test_a_full_disk_under_tensorboard_is_told_likewise(tmp_path):
    """TensorFlow writes its files, and raises errors of its own."""
    records = records_of(tmp_path)
    records.train(1, step_metrics(2.0))
    (events,) = tmp_path.glob("events*")
    size, limits = events.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="events.out.* cannot be written.*File too large"):
            records.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(metrics.read_jsonl(records.path)) == 1, "the limit lies below the other file"
    records.close()


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_recorded_and_raised(tmp_path, loss):
    records = records_of(tmp_path)
    records.train(7, step_metrics(float(loss)))
    with pytest.raises(NotFiniteError, match=f"loss is {loss} at step 7.* rate is 0.1: lower"):
        records.flush()
    records.close()
    # NaN is not JSON: other languages' parsers refuse the file.
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = [{"step": 10, "kind": "train", "loss": 2.0}, {"step": 20, "kind": "test"}]
    later = [{"step": 21, "kind": "train", "loss": 2.0}]
    lines = [json.dumps(r) + "\n" for r in kept + later]
    damaged = b'{"step":\n[1]\n{}\n\xff\n'
    path.write_bytes(lines[0].encode() + damaged + "".join(lines[1:]).encode() + b'{"step": 3')
    records_of(tmp_path, first_step=20).close()
    assert metrics.read_jsonl(str(path)) == kept

    last = [{"step": 50, "kind": "train", "loss": 2.0}, {"step": 50, "kind": "test"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept + last))
    records_of(tmp_path, first_step=50).close()
    assert metrics.read_jsonl(str(path)) == kept + last[:1], "the last evaluation is made again"
