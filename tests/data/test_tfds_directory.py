"""Splits of a tfds directory: found, checked and opened."""

import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from convstem_jax.data import pack, sources, tfds_directory
from convstem_jax.errors import ConfigError, DataError
from tests.data.embedded import DATASETS, NAME, ROOT


def test_all_files_of_a_split_may_be_open(monkeypatch):
    """ImageNet's training split has 1,024, and many machines allow 1,024 open files at first."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        split = sources.open_split(str(DATASETS), NAME, "train")
        assert min(hard, 4000) <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= hard
        monkeypatch.setattr(tfds_directory, "LEAST_FILES", hard)
        with pytest.raises(ConfigError, match="1 files to keep open.*raise the hard limit"):
            sources.open_split(str(DATASETS), NAME, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    class Full:
        def __getitem__(self, index):
            raise RuntimeError("open() failed: Too many open files")

        def __len__(self):
            return 1

    with pytest.raises(ConfigError, match="give it more memory or open files"):
        sources.Split(NAME, Full(), split.class_names)[0]


def test_a_file_cut_in_half_is_noticed_before_training(copied):
    path = next((copied / NAME).rglob("*train.array_record*"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"train\.array_record.*(10000|cannot be read)"):
        sources.open_split(str(copied), NAME, "train")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOENT])
def test_a_file_that_may_not_be_opened_is_not_damaged(code, monkeypatch):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tfds_directory, "open", refuse, raising=False)
    kind = DataError if code == errno.ENOENT else ConfigError
    with pytest.raises(kind, match=rf"train\.array_record.*{os.strerror(code)}"):
        sources.open_split(str(DATASETS), NAME, "train")


def test_another_count_than_described_is_noticed(copied):
    path = copied / NAME / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    split = next(s for s in info["splits"] if s["name"] == "test")
    split["shardLengths"] = ["2001"]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match="holds 2000 records, but dataset_info.json says 2001"):
        sources.open_split(str(copied), NAME, "test")


def test_files_in_another_format_name_the_conversion(copied):
    path = copied / NAME / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text()) | {"fileFormat": "tfrecord"}
    path.write_text(json.dumps(info))
    with pytest.raises(ConfigError, match="is in tfrecord.*'tfds convert_format'"):
        sources.open_split(str(copied), NAME, "train")


def test_missing_data_names_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="launch/prepare_imagenet.py --manual_dir") as error:
        sources.open_split(str(tmp_path), "imagenet2012", "train")
    assert "configs/quickstart.py" in str(error.value)
    with pytest.raises(ConfigError, match="no split 'val': it has test, train"):
        sources.open_split(str(DATASETS), NAME, "val")
    (tmp_path / NAME / "1.0.0").mkdir(parents=True)
    (tmp_path / NAME / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a tfds directory"):
        sources.open_split(str(tmp_path), NAME, "train")


def test_configurations_of_a_data_set(copied, tmp_path):
    (copied / "garments").mkdir()
    (copied / NAME).rename(copied / "garments/small")
    assert len(sources.open_split(str(copied), "garments/small", "test")) == 2_000
    with pytest.raises(ConfigError, match="set config.dataset to one, garments/small$"):
        sources.open_split(str(copied), "garments", "test")
    with pytest.raises(ConfigError, match=r"tfds.builder\('imagenette/320px-v2'"):
        sources.open_split(str(tmp_path), "imagenette/320px-v2", "train")
    with pytest.raises(ConfigError, match="tfds does not know it"):
        sources.open_split(str(tmp_path), "my photos", "train")
    flags = ["--dataset", "garments/small", "--data_dir", str(copied), "--splits", "test[:9]"]
    assert pack.main([*flags, "--output", str(tmp_path / "packed")]) == 0
    assert len(sources.open_split(str(tmp_path / "packed"), "garments/small", "test")) == 9


def test_a_part_of_a_split(train_split):
    part = sources.open_split(str(DATASETS), NAME, "train[20:25]")
    assert len(part) == 5
    np.testing.assert_array_equal(part[2]["image"], train_split[22]["image"])
    for wrong, message in (
        ("train[8:x]", "'train.8:x.' is not a part of the split 'train'"),
        ("train[5:5]", "has no split 'train.5:5.'"),
        ("train[90%:80%]", "has no split 'train.90%:80%.'"),
        ("train[:10%]+test[:10%]", "is not a split or a part of one"),
        ("tran[:5]", "has no split"),
    ):
        with pytest.raises(ConfigError, match=message):
            sources.open_split(str(DATASETS), NAME, wrong)


def test_the_highest_version_is_taken(copied):
    for decoy in ("1.0.0.bak", "incomplete.X1Y_2.0.0"):
        (copied / NAME / decoy).mkdir()
        (copied / NAME / decoy / "dataset_info.json").write_text("{")
    assert len(sources.open_split(str(copied), NAME, "test")) == 2_000
    (copied / NAME / "10.0.0").mkdir()
    (copied / NAME / "9.0.0").mkdir()
    for version in ("9.0.0", "10.0.0"):
        (copied / NAME / version / "dataset_info.json").write_text("{")
    with pytest.raises(ConfigError, match=r"10\.0\.0 cannot be read"):
        sources.open_split(str(copied), NAME, "test")


def test_reading_model_and_step_need_neither_tensorflow_nor_clu():
    code = (
        "import sys, convstem_jax.step, convstem_jax.data.pipeline\n"
        "from convstem_jax.data import sources\n"
        f"sources.open_split({str(DATASETS)!r}, {NAME!r}, 'test')[0]\n"
        "assert not {'tensorflow', 'clu'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
