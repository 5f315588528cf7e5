"""A data set in one file: of your own images, or for machines without tfds and ArrayRecord.

    python -m convstem_jax.data.packed --images photos --dataset photos --output data
    python -m convstem_jax.data.packed --dataset fashion_mnist_10k --output data

The first packs photos/train/CLASS/*.jpg (or .png) and photos/test/CLASS/*.jpg, the second a data
set of tfds. `data/photos.npz` is then what `config.data_dir=data` and `config.dataset=photos` name.
Packing holds all images in memory, and each start reads them once: this is for some gigabytes at
most.

exit status:
  0 done · 2 wrong arguments, no such data, or a folder that cannot be written · 3 damaged data
"""

import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import re
import struct
import sys
import zipfile

import numpy as np

from convstem_jax.errors import ConfigError, DataError, UserError, first_line
from convstem_jax.progress import progress_bar

_SUFFIXES = (".jpg", ".jpeg", ".png")
_PLACES = ("starts", "ends", "labels")  # of a split's images in its content


@dataclasses.dataclass(frozen=True)
class PackedRecords:
    """Records of a split: `records[i]` is `{"image": encoded bytes, "label": int}`."""

    content: np.ndarray  # uint8, one encoded image after another
    starts: np.ndarray  # [N], where each of them starts
    ends: np.ndarray  # [N]
    labels: np.ndarray  # [N]
    written: int | None = None  # ns, when the file was that the content is mapped from

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
    with open(path + ".tmp", "wb") as file:
        np.savez(file, class_names=np.array(class_names), **arrays)
    os.replace(path + ".tmp", path)


def read(path: str, split: str) -> tuple[PackedRecords, list[str]]:
    """Reads a split, or a part of it as tfds writes it, such as `train[:90%]` or `test[:256]`.

    Returns:
        The records and the names of the classes.

    Raises:
        ConfigError: there is no such split.
        DataError: the file is damaged.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+%?)?:(\d+%?)?\])?", split)
    if not match:
        raise ConfigError(f"'{split}' is not a split or a part of one, such as train[:90%]")
    name, *bounds = match.groups()
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            if f"{name}/labels" not in arrays:
                known = sorted(key.partition("/")[0] for key in arrays if key.endswith("/labels"))
                raise ConfigError(f"{path} has no split '{name}': it has {', '.join(known)}")
            rest = [arrays[f"{name}/{field}"] for field in _PLACES]
            written = os.fstat(file.fileno()).st_mtime_ns
            whole = _map(path, *_place(path, f"{name}/content"), written, *rest)
            class_names = arrays["class_names"].tolist()
    except ConfigError:
        raise
    except Exception as error:  # of zip files and NumPy
        raise DataError(f"{path} cannot be read: {first_line(error)}; pack it again") from error
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
    """Where the bytes of an array of an npz file lie, which is not compressed, and how many.

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


def pack(split) -> PackedRecords:
    """Packs a `sources.Split`.

    Raises:
        DataError: a record cannot be used, see there.
    """
    images, labels = [], []
    for i in progress_bar(range(len(split)), split.name, "image"):
        labels.append(int(split[i]["label"]))  # decoded only to see that it can be
        images.append(split.records[i]["image"])
    return records(images, labels)


def pack_folders(folder: str, splits: list[str]) -> tuple[dict[str, PackedRecords], list[str]]:
    """Packs the images of `folder/SPLIT/CLASS/`, each class by the place of its name in order.

    Returns:
        The splits, and the names of the classes, which are those of the first split.

    Raises:
        ConfigError: a split has no images, an empty folder, other files, one that cannot be read,
            or a class that the first one has not.
        DataError: files cannot be decoded; it names them all.
    """
    from convstem_jax.data.sources import decode  # which imports this module

    packed, classes, damaged = {}, [], []
    for split in splits:
        if not re.fullmatch(r"\w+", split):
            raise ConfigError(f"--splits {split}: a folder's name must be of letters and digits")
        root = pathlib.Path(folder, split)
        files = sorted(root.glob("[!.]*/[!.]*"))
        if not files:
            raise ConfigError(
                f"{root} holds no CLASS/*{', *'.join(_SUFFIXES)}: see --images and --splits"
            )
        folders = {path for path in root.glob("[!.]*") if path.is_dir()}
        if empty := sorted(map(str, folders - {file.parent for file in files})):
            raise ConfigError(f"fill or take away the folders without images: {', '.join(empty)}")
        classes = classes or sorted({file.parent.name for file in files})
        if len(classes) == 1:
            raise ConfigError(f"{root} has one class, {classes[0]}: images lie in SPLIT/CLASS/")
        for name in classes:
            if not name.isprintable():  # bytes that are no UTF-8, line breaks
                raise ConfigError(f"rename {str(root / name)!r}: that is no printable name")
        for file in files:
            if file.parent.name not in classes:
                raise ConfigError(f"{file.parent} is of a class that {splits[0]} does not have")
        if others := [str(file) for file in files if file.suffix.lower() not in _SUFFIXES]:
            suffixes = ", *".join(_SUFFIXES)
            raise ConfigError(f"take away what is none of *{suffixes}: {', '.join(others)}")
        labels = [classes.index(file.parent.name) for file in files]
        images = []
        for file in progress_bar(files, split, "image"):
            try:
                images.append(file.read_bytes())
            except OSError as error:
                raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
            if decode(images[-1]) is None:
                damaged.append(str(file))
        packed[split] = records(images, labels)
    if damaged:
        raise DataError(
            f"mend or take away what cannot be decoded as an image: {', '.join(damaged)}"
        )
    return packed, classes


def main(argv: list[str]) -> int:
    """Packs a data set of tfds, or folders of images; returns the exit status."""
    from convstem_jax.data import sources

    parser = argparse.ArgumentParser(
        prog="python -m convstem_jax.data.packed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, help="its name, such as fashion_mnist_10k")
    add("--images", metavar="FOLDER", help="pack FOLDER/SPLIT/CLASS/*.jpg, not a data set of tfds")
    add("--data_dir", default="datasets", help="folder that holds it (default: %(default)s)")
    add("--splits", default="train,test",
        help="folders in --images, or splits of tfds and parts: train[:1000],test "
        "(default: %(default)s)")  # fmt: skip
    add("--output", required=True, help="folder to write DATASET.npz in")
    args = parser.parse_args(argv)
    try:
        os.makedirs(args.output, exist_ok=True)
        names = args.splits.split(",")
        if args.images:
            splits, class_names = pack_folders(args.images, names)
        else:
            found = {
                name.partition("[")[0]: sources.open_split(args.data_dir, args.dataset, name)
                for name in names
            }
            splits = {name: pack(split) for name, split in found.items()}
            class_names = next(iter(found.values())).class_names
        path = os.path.join(args.output, f"{args.dataset}.npz")
        write(path, splits, class_names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"error: --output {args.output} cannot be written: {error}", file=sys.stderr)
        return ConfigError.status
    counts = ", ".join(f"{len(split):,} in {name}" for name, split in splits.items())
    print(f"{path}: {len(class_names)} classes, {counts}, {os.path.getsize(path) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
