"""Builds the first records of Fashion-MNIST as a tfds directory of ArrayRecord files.

Reads the four idx files of Debian's package dataset-fashion-mnist. Two runs write equal records.
"""

import argparse
import gzip
import pathlib
import tempfile
import zlib

import cv2
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
PNG_FLAGS = (cv2.IMWRITE_PNG_COMPRESSION, 9)
DESCRIPTION = (
    "Fashion-MNIST: 28x28 grey images of Zalando's articles in 10 classes. The first {train:,} "
    "training and the first {test:,} test records, which the original has in random order."
)
CITATION = """\
@article{xiao2017fashion,
  author  = {Han Xiao and Kashif Rasul and Roland Vollgraf},
  title   = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  journal = {arXiv preprint arXiv:1708.07747},
  year    = {2017},
}"""


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Returns the uint8 array of a gzipped idx file; ValueError if size and header disagree."""
    data = gzip.decompress(path.read_bytes())
    num_dims = data[3]
    shape = np.frombuffer(data, ">u4", num_dims, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


class FashionMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes `splits`: name -> (images `[N, 28, 28]`, labels `[N]`)."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, name: str, splits: dict, data_dir: pathlib.Path):
        self.name = name
        self.splits = splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        counts = {name: len(labels) for name, (_, labels) in self.splits.items()}
        image = tfds.features.Image(shape=(28, 28, 1), encoding_format="png")
        label = tfds.features.ClassLabel(names=CLASSES)
        info = tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION.format(**counts),
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            citation=CITATION,
            license="MIT License, Copyright 2017 Zalando SE",
        )
        info.as_proto.ClearField("module_name")  # It would say "__main__".
        return info

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(*split) for name, split in self.splits.items()}

    def _generate_examples(self, images, labels):
        # tfds stores records in the order of a hash of the key: shuffled, but the same in each run.
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = cv2.imencode(".png", image, PNG_FLAGS)[1].tobytes()
            yield i, {"image": png, "label": label}


def serialize_sorted(self, example: dict) -> bytes:
    """Replaces `ExampleSerializer.serialize_example`: fields in the order of their names."""
    return self.get_tf_example(example).SerializeToString(deterministic=True)


def main() -> None:
    """Parses the flags and builds the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="--train 60000 --test 10000 writes the whole set as fashion_mnist. Other counts add "
        "the number of training records to the name: fashion_mnist_10k.",
    )
    source = "/usr/share/datasets/fashion-mnist"
    here = pathlib.Path(__file__).resolve().parent
    source_help = "folder of the four idx files (default: %(default)s)"
    output_help = "where to make the data set's folder (default: the script's folder)"
    add = parser.add_argument
    add("--source", type=pathlib.Path, default=source, help=source_help)
    add("--output", type=pathlib.Path, default=here, help=output_help)
    add("--train", type=int, default=10_000, help="training records (default: %(default)s)")
    add("--test", type=int, default=2_000, help="test records (default: %(default)s)")
    args = parser.parse_args()

    splits = {}
    counts = {"train": args.train, "test": args.test}
    try:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = read_idx(args.source / f"{prefix}-images-idx3-ubyte.gz")
            labels = read_idx(args.source / f"{prefix}-labels-idx1-ubyte.gz")
            if not 0 < counts[split] <= len(labels):
                raise ValueError(f"{counts[split]} records asked for, of {len(labels)}")
            splits[split] = images[: counts[split]], labels[: counts[split]]
    except FileNotFoundError as error:
        remedy = "run `apt-get install dataset-fashion-mnist`, or give --source"
        parser.exit(2, f"error: {error.filename} is missing: {remedy}\n")
    except (EOFError, OSError, ValueError, zlib.error) as error:
        parser.exit(2, f"error: {split} split: {error}\n")

    name = "fashion_mnist"
    if counts != {"train": 60_000, "test": 10_000}:
        name += f"_{args.train}" if args.train % 1000 else f"_{args.train // 1000}k"
    builder = FashionMnist(name, splits, args.output)
    if builder.data_path.exists():
        parser.exit(2, f"error: {builder.data_path} exists: remove it, or give another --output\n")
    tfds.disable_progress_bar()
    # Otherwise protobuf's order of the two fields changes from process to process.
    ExampleSerializer.serialize_example = serialize_sorted
    with tempfile.TemporaryDirectory() as downloads:  # else an empty one stays in --output
        builder.download_and_prepare(download_dir=downloads)


if __name__ == "__main__":
    main()
