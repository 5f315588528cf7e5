"""What the programs share on a terminal: arguments, errors and progress bars."""

import argparse
from collections.abc import Iterable
import sys

from tqdm import tqdm


def new_parser(name: str, description: str, **options) -> argparse.ArgumentParser:
    """The parser of `python -m NAME`; `description` and `epilog` keep their lines."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def tell(error: Exception) -> int:
    """Prints an error as a line for the user; returns the status to end with."""
    print(f"error: {error}", file=sys.stderr)
    return getattr(error, "exit_status", 2)


def progress_bar(items: Iterable, what: str, unit: str) -> tqdm:
    """`items`, with how many are done and the time left on the standard error.

    A terminal shows it ten times a second; a log file, which keeps each bar, gets one in 30 s.
    """
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, desc=what, unit=unit, mininterval=interval, maxinterval=interval)
