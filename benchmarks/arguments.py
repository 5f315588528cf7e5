"""Arguments that the benchmarks share, and what their results tell of how they were made."""

import argparse
import os
import sys

from convstem_jax import files, provenance, terminal


def new_parser(
    name: str, description: str, json: str = "write the table as a list of objects too"
) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, with --json and its help."""
    parser = terminal.new_parser(f"benchmarks.{name}", description)
    parser.add_argument("--json", type=files.writable, metavar="FILE", help=json)
    return parser


def positive(text: str) -> int:
    """A `type` of argparse: how many of something."""
    return _multiple_of(1, text, "a whole number of 1 or more")


def even(text: str) -> int:
    """A `type` of argparse: the images of a batch."""
    return _multiple_of(2, text, "an even number of 2 or more, since images are mixed in pairs")


def _multiple_of(divisor: int, text: str, wanted: str) -> int:
    if not text.isdecimal() or not int(text) or int(text) % divisor:
        raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}")
    return int(text)


def made_by(argv: list[str] | None) -> dict:
    """Fields of a result: the command, of `argv` or else of this process, commit and versions."""
    return {
        "command": sys.argv[1:] if argv is None else argv,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
    }
