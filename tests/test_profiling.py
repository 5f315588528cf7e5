"""A profile is of the steps that were asked for, and never in the way of the run."""

import contextlib

import jax
import pytest

from convstem_jax import profiling
from convstem_jax.errors import Preempted
from tests.profiles import profiled_steps


class Pause:
    """Notes where training pauses, as `metrics.Records.pause` is asked to."""

    def __init__(self):
        self.steps = []

    @contextlib.contextmanager
    def __call__(self, step, unused_state):
        self.steps.append(step)
        yield


def train(first_step, steps, workdir, stop_at=None):
    pause = Pause()
    with profiling.profiled(first_step, steps, str(workdir), pause) as before_step:
        for step in steps:
            before_step(step, {})
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                pass
            if step == stop_at:
                raise Preempted("stopped")
    return pause.steps


def test_training_pauses_where_a_profile_begins_and_ends(tmp_path, capsys):
    assert train(12, range(11, 31), tmp_path) == [11, 16]
    assert profiled_steps(tmp_path) == [12, 13, 14, 15, 16]
    assert capsys.readouterr().out.startswith(f"profiled: tensorboard --logdir {tmp_path}")


def test_a_profile_is_cut_short_by_the_end(tmp_path):
    assert train(3, range(1, 5), tmp_path) == [2]
    assert profiled_steps(tmp_path) == [3, 4]


def test_without_a_profile_nothing_happens(tmp_path, capsys):
    assert train(0, range(1, 10), tmp_path / "a") == []
    assert capsys.readouterr().out == ""
    assert train(5, range(11, 31), tmp_path / "b") == []
    assert "config.profile_step=5 is not one of the steps 11 to 30" in capsys.readouterr().out
    assert train(5, range(11, 11), tmp_path / "c") == []
    assert capsys.readouterr().out == "", "a finished run"
    assert not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_hides_no_error(tmp_path, monkeypatch, capsys):
    def fail():
        raise RuntimeError("No space left on device")

    # JAX's own profile would not end then, and this process could take no other.
    monkeypatch.setattr(jax.profiler, "start_trace", lambda unused_folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with pytest.raises(Preempted):
        train(2, range(1, 10), tmp_path, stop_at=4)
    said = capsys.readouterr().out
    assert said == "no profile, it cannot be written: RuntimeError: No space left on device\n"
