"""Writes files that are whole or not there at all; says what is not there."""

from collections.abc import Iterable, Iterator
import contextlib
import difflib
import json
import os
from typing import IO


@contextlib.contextmanager
def replacing(path: str, mode: str) -> Iterator[IO]:
    """Opens a temporary file to write, which replaces `path` once all has been written.

    After an error the old file remains; if the machine dies, either the old or the new one, whole.
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


def not_there(path: str) -> str:
    """What to say of a path that does not exist: with the most similar name of its folder."""
    folder, name = os.path.split(path.rstrip("/"))
    names = []
    with contextlib.suppress(OSError):
        names = [x for x in os.listdir(folder or ".") if os.path.exists(os.path.join(folder, x))]
    near = difflib.get_close_matches(name, names, n=1)
    return f"{path} is not there" + "".join(f": is it {os.path.join(folder, x)}?" for x in near)


def write(path: str, content: str | bytes) -> None:
    """Writes `content` to a file, by `replacing`."""
    with replacing(path, "w" if isinstance(content, str) else "wb") as file:
        file.write(content)


def write_json(path: str, content: dict | list) -> None:
    """Writes `content` as JSON, by `replacing`."""
    write(path, json.dumps(content, indent=2) + "\n")


def write_jsonl(path: str, records: Iterable[dict]) -> None:
    """Writes records, each as a line of JSON, by `replacing`."""
    write(path, "".join(json.dumps(record) + "\n" for record in records))
