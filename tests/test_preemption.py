"""The first signal is a request, the second one is not."""

import signal
import threading

import pytest

from convstem_jax.preemption import stop_requested


def test_the_second_signal_acts():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_requested() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop_requested() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
    assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]


def test_a_thread_may_train_too():
    seen = []

    def run():
        with stop_requested() as stop:
            seen.append(stop.is_set())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
