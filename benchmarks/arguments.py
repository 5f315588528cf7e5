"""What the benchmarks share: arguments, tables, and how a result was made."""

import argparse
from collections.abc import Sequence
import os
import sys

from tabulate import tabulate

from convstem_jax import provenance, terminal


def new_parser(
    name: str, description: str, json: str = "write the table as a list of objects too"
) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, with --json and its help."""
    parser = terminal.new_parser(f"benchmarks.{name}", description)
    parser.add_argument("--json", type=terminal.writable, metavar="FILE", help=json)
    return parser


def even(text: str) -> int:
    """An even number of 2 or more, for argparse: the images of a batch."""
    number = terminal.positive(text)
    if number % 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be even: images are mixed in pairs")
    return number


def table(headers: Sequence[str], lines: Sequence[Sequence], num_text: int = 1) -> str:
    """A table in Markdown: the first columns are text, the others numbers."""
    align = ["left"] * num_text + ["right"] * (len(headers) - num_text)
    return tabulate(lines, headers, "github", disable_numparse=True, colalign=align)


def made_by(argv: list[str] | None) -> dict:
    """Fields of a result: the command (`argv`, or else this process's), and what it ran on."""
    return {
        "command": sys.argv[1:] if argv is None else argv,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "processor": provenance.processor(),
    }
