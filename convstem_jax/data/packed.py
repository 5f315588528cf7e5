"""A data set in one file, an npz that `convstem_jax.data.pack` writes."""

from collections.abc import Sequence
import dataclasses
import os
import re
import struct
import zipfile

import numpy as np

from convstem_jax import files
from convstem_jax.errors import ConfigError, DataError, reading

_PLACES = ("starts", "ends", "labels")  # of a split's images in its content


@dataclasses.dataclass(frozen=True)
class PackedRecords:
    """Records of a split: `records[i]` is `{"image": encoded bytes, "label": int}`."""

    content: np.ndarray  # uint8, one encoded image after another
    starts: np.ndarray  # [N], where each of them starts
    ends: np.ndarray  # [N]
    labels: np.ndarray  # [N]
    written: int | None = None  # ns, when the file that the content is mapped from was written

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self):
        """For worker processes: a file is mapped there too, so that all share its memory."""
        rest = self.starts, self.ends, self.labels
        if self.written is None:
            return PackedRecords, (self.content, *rest)
        content = self.content
        return _map, (content.filename, content.offset, content.size, self.written, *rest)

    def __getitem__(self, i: int) -> dict:
        image = self.content[self.starts[i] : self.ends[i]]
        return {"image": image.tobytes(), "label": self.labels[i]}


def _map(path: str, offset: int, size: int, written: int, *rest: np.ndarray) -> PackedRecords:
    content = np.memmap(path, np.uint8, "r", offset, (size,))
    if os.stat(path).st_mtime_ns != written:
        raise DataError(f"{path} was packed again while it was in use: start again")
    return PackedRecords(content, *rest, written)


def write(path: str, splits: dict[str, PackedRecords], class_names: Sequence[str]) -> None:
    """Writes the splits of a data set, as `read` reads them."""
    arrays = {
        f"{name}/{key}": getattr(records, key)
        for name, records in splits.items()
        for key in ("content", *_PLACES)
    }
    with files.replacing(path, "wb") as file:
        np.savez(file, class_names=np.array(class_names), **arrays)


def read(path: str, split: str) -> tuple[PackedRecords, list[str]]:
    """Reads a split, or a part of it as tfds writes it, such as `train[:90%]` or `test[:256]`.

    Returns:
        The records and the names of the classes.

    Raises:
        ConfigError: there is no such split, or this process may not read it.
        DataError: the file is damaged.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match:
        raise ConfigError(f"'{split}' is not a split or a part of one, such as train[:90%]")
    name, *bounds = match.groups()
    with reading(path, "pack it again"), open(path, "rb") as file, np.load(file) as arrays:
        if f"{name}/labels" not in arrays:
            known = sorted(key.partition("/")[0] for key in arrays if key.endswith("/labels"))
            raise ConfigError(f"{path} has no split '{name}': it has {', '.join(known)}")
        rest = [arrays[f"{name}/{field}"] for field in _PLACES]
        written = os.fstat(file.fileno()).st_mtime_ns
        whole = _map(path, *_place(path, f"{name}/content"), written, *rest)
        class_names = arrays["class_names"].tolist()
    first, last = (
        default if not bound
        else round(len(whole) * int(bound[:-1]) / 100) if bound.endswith("%")
        else int(bound)
        for bound, default in zip(bounds, (0, len(whole)), strict=True)
    )  # fmt: skip
    if not first < last <= len(whole):
        raise ConfigError(f"'{split}' cannot be read: '{name}' of {path} has {len(whole)} records")
    part = slice(first, last)
    places = {field: getattr(whole, field)[part] for field in _PLACES}
    return dataclasses.replace(whole, **places), class_names


def _place(path: str, name: str) -> tuple[int, int]:
    """Where the bytes of an array lie in an uncompressed npz file, and how many there are.

    Raises:
        zipfile.BadZipFile: they differ from their checksum.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as content:
            while content.read(2**20):
                pass
        # The local header has 30 bytes and two lengths, of a name and of extra fields behind it.
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        np.lib.format.read_magic(file)
        (size,), _, _ = np.lib.format.read_array_header_1_0(file)
        return file.tell(), size


def records(images: list[bytes], labels: list[int]) -> PackedRecords:
    """Packs encoded images and their labels."""
    ends = np.cumsum([len(image) for image in images])
    return PackedRecords(
        content=np.frombuffer(b"".join(images), np.uint8),
        starts=np.concatenate([[0], ends[:-1]]),
        ends=ends,
        labels=np.array(labels),
    )
