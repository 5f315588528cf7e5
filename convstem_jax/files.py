"""Files that are whole or not there at all."""

from collections.abc import Iterable
import json
import os


def write(path: str, content: str | bytes) -> None:
    """Writes a file so that a machine that dies leaves the old one or the new one, and whole."""
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{name}.tmp")
    with open(unfinished, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: str, content: dict | list) -> None:
    """`write` of `content`."""
    write(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """`write` of records, each as a line of JSON."""
    write(path, "".join(json.dumps(record) + "\n" for record in records))
