"""Files that are whole or not there at all."""

import argparse
from collections.abc import Iterable
import json
import os


def write_text(path: str, text: str) -> None:
    """Writes a file so that a machine that dies leaves the old one or the new one, and whole."""
    _write(path, text, "w")


def write_bytes(path: str, content: bytes) -> None:
    """Likewise."""
    _write(path, content, "wb")


def write_json(path: str, content: dict | list) -> None:
    """`write_text` of `content`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """`write_text` of records, each as a line of JSON."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _write(path: str, content: str | bytes, mode: str) -> None:
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{name}.tmp")
    with open(unfinished, mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def writable(path: str) -> str:
    """The path, if a file can be written there: a `type` of argparse, checked before the work.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    # A file is written beside the old one, which it then replaces: a link or a device must not be.
    is_file = not os.path.islink(path) and (os.path.isfile(path) or not os.path.exists(path))
    if not is_file or not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name a file in another folder")
    return path
