"""What the programs share on a terminal: arguments, errors and progress bars."""

import argparse
from collections.abc import Iterable, Iterator
import contextlib
import errno
import os
import sys
from typing import TextIO

from tqdm import tqdm

from convstem_jax.errors import Preempted, UserError


def new_parser(name: str, description: str, **options) -> argparse.ArgumentParser:
    """The parser of `python -m NAME`; `description` and `epilog` keep their lines."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def positive(text: str) -> int:
    """A whole number of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


def writable(path: str) -> str:
    """The path, if a file can be written there: a `type` for argparse, checked before the work.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    # A file is written beside the old one and then replaces it: never a link or a device.
    is_file = not os.path.islink(path) and (os.path.isfile(path) or not os.path.exists(path))
    if not is_file or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name a file in another folder")
    return path


def tell(error: Exception) -> int:
    """Prints an error as a line for the user; returns the status to end with."""
    prefix = "" if isinstance(error, Preempted) else "error: "
    print(f"{prefix}{error}", file=sys.stderr)
    if not isinstance(error, UserError):
        return 2
    if error.exit_status != error.status:
        print("storage did not answer: first give the same command again", file=sys.stderr)
    return error.exit_status


class _Stream:
    """A stream that drops what cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            # Nobody will ever read it. Otherwise Python would try once more when it ends.
            if error.errno in (errno.EPIPE, errno.EIO):
                with open(os.devnull, "w") as nobody:
                    os.dup2(nobody.fileno(), self._stream.fileno())


@contextlib.contextmanager
def outlive_readers() -> Iterator[None]:
    """Lets a run go on where its terminal or a reader of its output, such as tee, is gone."""
    # One that was closed when Python started is None.
    streams = [s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr)]  # noqa: SIM115
    sys.stdout, sys.stderr = map(_Stream, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


def duration(seconds: float) -> str:
    """`1 h 05 min` or `2 min 09 s`."""
    seconds = round(seconds)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds % 60:02d} s"


def progress_bar(items: Iterable, what: str, unit: str) -> tqdm:
    """`items`, with how many are done and the time left on the standard error.

    A terminal shows it ten times a second; a log file, which keeps each bar, gets one in 30 s.
    """
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, desc=what, unit=unit, mininterval=interval, maxinterval=interval)
