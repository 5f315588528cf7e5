"""Notices that the machine asks the run to stop, so that it can save first."""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

_interrupted = threading.Event()
_asked = itertools.count(1)  # how often JAX has been asked


def interrupt(signum, unused_frame):
    """What Ctrl-C does until `stop_requested` catches it: raises KeyboardInterrupt.

    It also tells `stop_requested`, since an exception that is raised in a callback, of a compiler
    or a finaliser, does not get any further.
    """
    _interrupted.set()
    raise KeyboardInterrupt(signum)


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM, SIGHUP and Ctrl-C in the block; yields a function that tells if one came.

    The function is called once after each step; where several processes run it becomes true at the
    same step in all of them, whichever got the signal.

    A second signal of the same kind acts as if nothing caught it, except for SIGHUP: when a
    terminal is closed, it and its shell send one each. A signal that the process was started to
    ignore stays ignored, such as Ctrl-C in a shell script's background job. Outside the main
    thread, where Python allows no handlers, the function is never true.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt
    event, old = threading.Event(), {}
    distributed = jax.distributed.is_initialized()

    def handle(signum, unused_frame):
        is_first = not event.is_set()
        event.set()
        words = b"stopping after the steps or evaluation under way"
        if signum != signal.SIGHUP:
            signal.signal(signum, old[signum])
            words += b"; the same signal again stops at once, unsaved"
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, words + b"\n")
        if distributed and is_first:
            os.kill(os.getpid(), signal.SIGTERM)

    signals = [signal.SIGINT, signal.SIGHUP]
    if not distributed:  # else JAX itself catches SIGTERM and tells the other processes
        signals.append(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        for signum in signals:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                old[signum] = signal.signal(signum, handle)
    try:
        if distributed:
            # JAX stops all at the number after the largest that it was asked about, which is 1 for
            # a signal that comes before any: a resumed run that gave its steps would never ask
            # about 1.
            yield lambda: multihost_utils.reached_preemption_sync_point(next(_asked))
        else:
            yield event.is_set
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def live_as_long_as_the_main_process() -> None:
    """For a worker process: leaves signals to the main process, and ends with it.

    Ctrl-C and cluster schedulers signal every process of a group. The main process saves and then
    ends its workers; without them it could make no further step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)  # it was killed, and could not end its workers

    threading.Thread(target=follow, daemon=True).start()
