"""Splits of image classification data sets, as decoded records with random access."""

from collections.abc import Sequence
import dataclasses
import hashlib
import os
from typing import Any

import cv2
import numpy as np

from convstem_jax.data import packed
from convstem_jax.errors import ConfigError, DataError, reading


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of an image classification data set: a sequence of decoded records.

    `split[i]` is `{"image": uint8 [h, w, 3], "label": int32}` and raises `DataError` where record
    i cannot be decoded or its label is outside the classes, `ConfigError` where this process lacks
    memory, open files or permission, `IndexError` where there is no record i.
    """

    name: str
    records: Any  # of dicts with "image" (encoded bytes) and "label"
    class_names: Sequence[str]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """A hash of the split's length, its classes' names, and 64 records from first to last.

        Images are hashed as they are stored: what a decoder makes of them does not count.

        Raises:
            ConfigError, DataError: one of the records cannot be read.
        """
        found = hashlib.sha256(repr([len(self), *self.class_names]).encode())
        for i in np.unique(np.linspace(0, len(self) - 1, 64, dtype=int)):
            record = self._read(i)
            found.update(b"%d " % record["label"] + record["image"])
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        where = f"split {self.name}, record {index}"
        if not 0 <= index < len(self):
            raise IndexError(f"{where}: it has {len(self)}")
        record = self._read(index)
        label = int(record["label"])
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{where}: label {label} is outside the {self.num_classes} classes 0 to "
                f"{self.num_classes - 1}; build the data anew"
            )
        image = decode(record["image"])
        if image is None:
            raise DataError(f"{where}: the image cannot be decoded; build the data anew")
        return {"image": image, "label": np.int32(label)}

    def _read(self, index: int) -> dict:
        with reading(f"split {self.name}, record {index}", "build the data anew"):
            return self.records[index]


def decode(encoded: bytes) -> np.ndarray | None:
    """The image in a file's bytes, uint8 `[h, w, 3]`; None where they are not an image.

    OpenCV rotates it as EXIF says, as it does for the authors.
    """
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # no bytes, or more pixels than OpenCV takes
        return None


def open_split(data_dir: str, dataset: str, split: str) -> Split:
    """Opens a split of a tfds directory, or of the packed file that stands for it.

    Args:
        data_dir: folder of data sets.
        dataset: name of one.
        split: name of one of its splits, or a part as tfds writes it: `train[:90%]`.

    Raises:
        ConfigError: there is no such data set or split, or it has another format.
        DataError: it is damaged.
    """
    if "://" in data_dir:
        raise ConfigError(
            f"config.data_dir={data_dir} is not a folder, and records come too slowly from a "
            "bucket: copy the data with launch/data.sh (docs/data_on_a_pod.md)"
        )
    data_dir = os.path.expanduser(data_dir)
    packed_file = os.path.join(data_dir, f"{dataset}.npz")
    if os.path.exists(packed_file):
        return Split(f"{dataset}/{split}", *packed.read(packed_file, split))
    try:
        from convstem_jax.data import tfds_directory
    except ImportError as error:
        raise ConfigError(
            f"{packed_file} is not there, and a tfds directory cannot be read: {error}. Install "
            "requirements.txt, or pack the data set where that is installed: "
            "python -m convstem_jax.data.pack --help"
        ) from error
    return Split(f"{dataset}/{split}", *tfds_directory.read(data_dir, dataset, split))
