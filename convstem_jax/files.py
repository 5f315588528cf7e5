"""Files that are whole or not there at all."""

from collections.abc import Iterable, Iterator
import contextlib
import json
import os
from typing import IO


@contextlib.contextmanager
def replacing(path: str, mode: str) -> Iterator[IO]:
    """Opens a file to write, which takes its place when all has been written.

    An error leaves the old one, and a machine that dies the old one or the new one, and whole.
    """
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{name}.tmp")
    try:
        with open(unfinished, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        raise


def write(path: str, content: str | bytes) -> None:
    """`replacing` by `content`."""
    with replacing(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)


def write_json(path: str, content: dict | list) -> None:
    """`write` of `content`."""
    write(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """`write` of records, each as a line of JSON."""
    write(path, "".join(json.dumps(record) + "\n" for record in records))
