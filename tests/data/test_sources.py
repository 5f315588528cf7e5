"""Splits and their records: decoded, damaged, or not there."""

import json
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest

from convstem_jax import data
from convstem_jax.data import pipeline, sources
from convstem_jax.errors import ConfigError, DataError
from tests.data.embedded import DATASETS, NAME, THREADS, take, train_batches


def test_embedded_data(train_split, test_split):
    assert (len(train_split), len(test_split)) == (10_000, 2_000)
    assert len(list(sources.open_split("datasets", NAME, "test[:3]"))) == 3  # and then it ends
    assert train_split.num_classes == 10
    record = train_split[7]
    assert record["image"].shape == (28, 28, 3) and record["image"].dtype == np.uint8
    labels = [test_split.records[i]["label"] for i in range(2_000)]
    assert np.bincount(labels).min() > 150, "a class is missing or rare"
    assert "MIT" in (DATASETS / NAME / "LICENSE").read_text()
    size = sum(f.stat().st_size for f in (DATASETS / NAME).rglob("*"))
    assert size <= 8e6, "the embedded data must stay under 8 MB"


def test_colours_arrive_as_rgb():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    encoded = cv2.imencode(".png", red[..., ::-1])[1].tobytes()
    split = sources.Split("x/train", [{"image": encoded, "label": 0}], "a")
    assert (split[0]["image"] == red).all()


def test_a_label_outside_the_classes_names_split_record_and_label(copied):
    path = copied / NAME / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    label = features["featuresDict"]["features"]["label"]["classLabel"]
    label["numClasses"] = "7"
    path.write_text(json.dumps(features))
    (path.parent / "label.labels.txt").unlink()
    split = sources.open_split(str(copied), NAME, "train")
    assert split.num_classes == 7
    workers = pipeline.Reading(num_workers=1, num_threads=1, read_ahead=1, prefetch=1)
    for reading in (THREADS, workers):
        with pytest.raises(DataError, match=r"fashion_mnist_10k/train, record \d+: label [789]"):
            take(train_batches(split, reading=reading), 5)


def test_an_image_that_cannot_be_decoded_names_its_record():
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)  # OpenCV raises at the size
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    png += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    for content in (b"no image", b"", png):
        assert sources.decode(content) is None
    split = sources.Split("x/train", [{"image": b"no image", "label": 1}], "ab")
    with pytest.raises(DataError, match=r"x/train, record 0: the image cannot be decoded"):
        split[0]


def test_another_decoder_changes_no_fingerprint(test_split, monkeypatch):
    expected = test_split.fingerprint()
    monkeypatch.setattr(sources, "decode", lambda encoded: np.zeros((9, 9, 3), np.uint8))
    assert test_split.fingerprint() == expected


def test_a_damaged_record_is_named(copied):
    path = next((copied / NAME).rglob("*test.array_record*"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = bytes(5000)
    path.write_bytes(content)
    split = sources.open_split(str(copied), NAME, "test")
    with pytest.raises(DataError, match=r"fashion_mnist_10k/test, record \d+ cannot be read"):
        for i in range(len(split)):
            split[i]


def test_a_bucket_is_refused():
    with pytest.raises(ConfigError, match=r"data_dir=gs://b/data is not a folder.*launch/data.sh"):
        sources.open_split("gs://b/data", "imagenet2012", "train")


def test_without_tfds_the_remedy_is_a_packed_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "convstem_jax.data.tfds_directory", None)
    monkeypatch.delattr(data, "tfds_directory", raising=False)
    with pytest.raises(ConfigError, match="python -m convstem_jax.data.pack"):
        sources.open_split(str(DATASETS), NAME, "test")
