"""Packs your own images, or a data set of tfds, into one file that needs no tfds or ArrayRecord.

    python -m convstem_jax.data.pack --images photos --dataset photos --output data
    python -m convstem_jax.data.pack --dataset fashion_mnist_10k --output data

The first packs photos/train/CLASS/*.jpg (or .png) and photos/test/CLASS/*.jpg, the second a data
set of tfds. `config.data_dir=data` and `config.dataset=photos` then select `data/photos.npz`.
Packing holds all images in memory, and each start of a run reads them once: this is for a few
gigabytes at most.

exit status:
  0 done · 2 wrong arguments, no such data, or a folder that cannot be written · 3 damaged data
"""

import os
import pathlib
import re
import sys

import numpy as np

from convstem_jax.data import sources
from convstem_jax.data.packed import PackedRecords, records, write
from convstem_jax.errors import ConfigError, DataError, UserError
from convstem_jax.terminal import new_parser, progress_bar, tell

_SUFFIXES = (".jpg", ".jpeg", ".png")


def pack(split: sources.Split) -> PackedRecords:
    """Packs a split.

    Raises:
        DataError: a record cannot be used: see `sources.Split`.
    """
    images, labels = [], []
    for i in progress_bar(range(len(split)), split.name, "image"):
        labels.append(int(split[i]["label"]))  # decoded only to see that it can be
        images.append(split.records[i]["image"])
    return records(images, labels)


def pack_folders(folder: str, splits: list[str]) -> tuple[dict[str, PackedRecords], list[str]]:
    """Packs the images of `folder/SPLIT/CLASS/`; classes are numbered in the order of their names.

    Returns:
        The splits, each shuffled, always in the same way; and the names of the classes, which are
        those of the first split.

    Raises:
        ConfigError: a split has no images, an empty folder, other files, files beside its folders,
            a file that cannot be read, or a class that the first split does not have.
        DataError: files cannot be decoded; it names them all.
    """
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
        if stray := sorted(str(path) for path in root.glob("[!.]*") if not path.is_dir()):
            raise ConfigError(f"move into a class's folder, or take away: {', '.join(stray[:9])}")
        folders = set(root.glob("[!.]*"))
        if empty := sorted(map(str, folders - {file.parent for file in files})):
            raise ConfigError(f"fill or take away the folders without images: {', '.join(empty)}")
        classes = classes or sorted({file.parent.name for file in files})
        if len(classes) == 1:
            raise ConfigError(f"{root} has one class, {classes[0]}: images lie in SPLIT/CLASS/")
        for name in classes:
            if not name.isprintable():  # bytes that are not UTF-8, line breaks
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
            if sources.decode(images[-1]) is None:
                damaged.append(str(file))
        # Shuffled, as tfds does, so that a part such as train[:90%] has examples of all classes.
        order = np.random.default_rng(0).permutation(len(files))
        packed[split] = records([images[i] for i in order], [labels[i] for i in order])
    if damaged:
        raise DataError(
            f"mend or take away what cannot be decoded as an image: {', '.join(damaged)}"
        )
    return packed, classes


def main(argv: list[str]) -> int:
    """Packs a data set of tfds, or folders of images; returns the exit status."""
    parser = new_parser("convstem_jax.data.pack", __doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="its name, such as fashion_mnist_10k")
    add("--images", metavar="FOLDER", help="pack FOLDER/SPLIT/CLASS/*.jpg, not a data set of tfds")
    add("--data_dir", default="datasets", help="folder that holds it (default: %(default)s)")
    add("--splits", default="train,test",
        help="folders in --images, or splits of tfds or parts of them: train[:1000],test "
        "(default: %(default)s)")  # fmt: skip
    add("--output", required=True, help="folder to write DATASET.npz in")
    args = parser.parse_args(argv)
    try:
        path = os.path.join(args.output, f"{args.dataset}.npz")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        names = args.splits.split(",")
        if len({name.partition("[")[0] for name in names}) < len(names):
            raise ConfigError(f"--splits {args.splits} names a split twice: name each once")
        if args.images:
            splits, class_names = pack_folders(args.images, names)
        else:
            found = {
                name.partition("[")[0]: sources.open_split(args.data_dir, args.dataset, name)
                for name in names
            }
            splits = {name: pack(split) for name, split in found.items()}
            class_names = next(iter(found.values())).class_names
        write(path, splits, class_names)
    except UserError as error:
        return tell(error)
    except OSError as error:
        return tell(ConfigError(f"--output {args.output} cannot be written: {error}"))
    counts = ", ".join(f"{len(split):,} in {name}" for name, split in splits.items())
    print(f"{path}: {len(class_names)} classes, {counts}, {os.path.getsize(path) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
