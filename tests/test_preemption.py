"""The first signal is a request to stop; the second acts at once."""

import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest

from convstem_jax import launch_local, preemption
from convstem_jax.preemption import stop_requested


@pytest.fixture
def usual_handlers():
    """Whoever started the tests may have had signals ignored, as shells do for background jobs."""
    usual = {signal.SIGINT: signal.default_int_handler}
    usual |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)
    before = {signum: signal.signal(signum, handler) for signum, handler in usual.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("usual_handlers")
def test_the_second_signal_acts():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_requested() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop_requested() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    with stop_requested() as stop:
        for _ in range(2):  # of a terminal that is closed, and of its shell
            signal.raise_signal(signal.SIGHUP)
        assert stop()
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_a_worker_leaves_all_signals_of_its_group_to_the_main_process(monkeypatch):
    ignored = {}
    monkeypatch.setattr(signal, "signal", ignored.__setitem__)
    monkeypatch.setattr(threading, "Thread", mock.Mock())
    preemption.live_as_long_as_the_main_process()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert ignored == dict.fromkeys(signals, signal.SIG_IGN)


@pytest.mark.usefixtures("usual_handlers")
def test_a_signal_is_met_where_nobody_reads_what_is_said_of_it(monkeypatch):
    monkeypatch.setattr(os, "write", mock.Mock(side_effect=BrokenPipeError))
    with stop_requested() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop()


@pytest.mark.usefixtures("usual_handlers")
def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requested() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()


@pytest.mark.usefixtures("usual_handlers")
def test_an_interruption_that_a_callback_swallowed_counts(monkeypatch):
    monkeypatch.setattr(preemption, "_interrupted", threading.Event())
    signal.signal(signal.SIGINT, preemption.interrupt)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_requested():
        pass


JOINED = """
import os, signal, sys, time
import jax
import jax.numpy as jnp
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.preemption import stop_requested
address, directory = sys.argv[1:]
jax.distributed.initialize(address, 1, 0)
with stop_requested() as stop:
    if directory:
        checkpoints = Checkpoints(directory)
        checkpoints.save(50, {"step": jnp.int32(50)}, {})
        checkpoints.close()
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.time() + 30
    while not (stopped := stop()) and time.time() < end:  # JAX notices after about a second
        time.sleep(0.1)
    print(stopped, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("saves", [False, True], ids=["", "after a save"])
def test_a_request_is_met_after_the_next_step_where_processes_are_joined(saves, tmp_path):
    directory = str(tmp_path / "checkpoints") if saves else ""
    command = [sys.executable, "-c", JOINED, launch_local.free_address(), directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


def test_a_thread_may_train_too():
    seen = []

    def run():
        with stop_requested() as stop:
            seen.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
