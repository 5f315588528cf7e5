"""The constructed data set: garments over photographs."""

import cv2
import numpy as np
import pytest

from convstem_jax.config import load_config
from convstem_jax.data import packed, sources
from convstem_jax.data.pack import pack
from convstem_jax.study import colour_set, experiments

COUNTS = {"train": 1000, "test": 200}
NAME = "fashion_photos_1k"


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    """A folder with the first garments of the embedded data."""
    splits = {
        name: pack(sources.open_split("datasets", "fashion_mnist_10k", f"{name}[:{count}]"))
        for name, count in COUNTS.items()
    }
    folder = tmp_path_factory.mktemp("garments")
    packed.write(str(folder / "fashion_mnist_1k.npz"), splits, list("0123456789"))
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Eight plain ones; those for the test split, every fourth, are of a brighter blue."""
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(8):
        bgr = np.full((100, 120, 3), (220 if i % 4 == 3 else 40, 0, 0), np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), bgr)
    return folder


def build(garments, photographs, output):
    paths = {"data_dir": garments, "photographs": photographs, "output": output}
    flags = [f"--{name}={path}" for name, path in paths.items()]
    return colour_set.main(["--garments=fashion_mnist_1k", *flags])


@pytest.fixture(scope="module")
def built(garments, photographs, tmp_path_factory):
    output = tmp_path_factory.mktemp("built")
    assert build(garments, photographs, output) == 0
    return output


def test_every_garment_is_there_in_its_order(garments, built):
    for split, count in COUNTS.items():
        before = sources.open_split(str(garments), "fashion_mnist_1k", split)
        after = sources.open_split(str(built), NAME, split)
        assert len(after) == count
        assert [after[i]["label"] for i in range(count)] == [
            before[i]["label"] for i in range(count)
        ]
        assert after[0]["image"].shape == (32, 32, 3)


def test_backgrounds_of_train_and_test_are_disjoint(built):
    for split, low, high in (("train", 0, 130), ("test", 130, 256)):
        found = sources.open_split(str(built), NAME, split)
        corners = [found[i]["image"][-1, 0] for i in range(COUNTS[split])]
        blues = [b for r, g, b in corners if r < 12 and g < 12]  # where no garment reaches
        assert len(blues) > COUNTS[split] / 2
        assert low <= min(blues) and max(blues) < high


def test_garments_differ_in_hue_and_place(built):
    found = sources.open_split(str(built), NAME, "train")
    trousers = [found[i]["image"] for i in range(1000) if found.records[i]["label"] == 1]
    hues, rows, columns = [], [], []
    for image in trousers:
        inside = image[..., :2].max(-1) > 60  # the backgrounds have no red and no green
        if inside.sum() > 20:
            y, x = np.nonzero(inside)
            rows.append(y.mean())
            columns.append(x.mean())
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hues.append(np.median(hsv[..., 0][inside]))
    assert len(hues) > 60
    assert np.std(rows) > 1 and np.std(columns) > 1
    assert min(np.histogram(hues, 5, (0, 120))[0]) > 3, "hues are missing"


def test_two_builds_are_equal(garments, built, photographs, tmp_path, capsys):
    assert build(garments, photographs, tmp_path) == 0
    with np.load(built / f"{NAME}.npz") as first, np.load(tmp_path / f"{NAME}.npz") as second:
        assert set(first) == set(second)
        assert all((first[key] == second[key]).all() for key in first)
    assert "6 photographs behind the training images, 2 others" in capsys.readouterr().out


def test_what_is_missing_is_named(garments, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(colour_set, "MATE", str(tmp_path / "absent"))
    assert colour_set.main(["--output", str(tmp_path)]) == 2
    assert "absent is no photograph" in capsys.readouterr().err
    assert build(garments, photographs / "1.png", tmp_path) == 2
    assert "1 are too few to part" in capsys.readouterr().err
    assert build(tmp_path, photographs, tmp_path) == 2
    assert "fashion_mnist_1k" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_study_takes_it():
    for arg, name in (("colour", "fashion_photos_10k"), ("full,colour", "fashion_photos")):
        config = load_config(f"configs/study.py:{arg}")
        run = experiments.run_config(config, experiments.grids(config)[0])
        assert run.dataset == name and run.mean != load_config("configs/study.py").mean
