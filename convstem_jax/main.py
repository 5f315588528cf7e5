"""Trains a model, or continues an interrupted run."""

import os
import signal
import sys
import traceback

# The imports below take seconds: Ctrl-C during them needs no traceback. A shell makes its
# background jobs ignore Ctrl-C.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# TensorFlow only writes our TensorBoard files; its start-up messages are not needed.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

if __name__ != "__mp_main__":  # worker processes run this file too, and only read data
    import jax

    from convstem_jax import command_line, preemption, processes, train

_EPILOG = """\
examples:
  python -m convstem_jax.main --config configs/quickstart.py
  python -m convstem_jax.main --config configs/vitc.py:18gf,sgd --workdir runs/first
  python -m convstem_jax.main --config configs/vitc.py --config.lr=5e-4 --config.epochs=50

configs/common.py lists the fields. The same command run again resumes an interrupted run.

"""


def main(argv: list[str]) -> int:
    """Reads the command line and trains; returns the exit status."""
    return command_line.run(
        train.train,
        argv,
        name="convstem_jax.main",
        description=__doc__,
        epilog=_EPILOG + command_line.EXIT_STATUS,
        several_processes=True,
    )


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, preemption.interrupt)
    if "--traceback" not in sys.argv:
        command_line.silence_libraries()
    try:
        status = main(sys.argv[1:])
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if jax.distributed.is_initialized():
        processes.leave(status)
    if status == 130:  # Threads that compile or read may still be at work.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
