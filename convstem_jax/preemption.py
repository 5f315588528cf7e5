"""Notices that the machine asks the run to stop, so that it can save first."""

import contextlib
import os
import signal
import threading


@contextlib.contextmanager
def stop_requested():
    """Catches SIGTERM and Ctrl-C inside the block, and yields an event that they set.

    A second signal of the same kind acts as if nothing caught it. A signal that the process was
    started to ignore stays ignored, such as Ctrl-C in a shell script's background job. Outside the
    main thread, where Python allows no handlers, the event is never set.
    """
    event, old = threading.Event(), {}

    def handle(signum, unused_frame):
        event.set()
        os.write(2, b"stopping after this step; again to stop at once, without saving\n")
        signal.signal(signum, old[signum])

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                old[signum] = signal.signal(signum, handle)
    try:
        yield event
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
