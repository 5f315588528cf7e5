"""Progress bars, in a terminal and in a log file."""

from collections.abc import Iterable
import sys

from tqdm import tqdm


def progress_bar(items: Iterable, what: str, unit: str) -> tqdm:
    """`items`, with how many are done and the time left on the standard error.

    A terminal shows it ten times a second; a log file, which keeps each bar, gets one in 30 s.
    """
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, desc=what, unit=unit, mininterval=interval, maxinterval=interval)
