"""The folder of a run."""

import contextlib
import json
import os
import tempfile

import pytest

from convstem_jax import run_folder
from convstem_jax.config import load_config
from convstem_jax.errors import ConfigError


@contextlib.contextmanager
def without_root():
    """Gives up root's right to write everywhere, where the tests run as root."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_may_not_be_written_is_refused():
    config = load_config("configs/quickstart.py")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which only its owner may enter
        os.chmod(folder, 0o555)
        message = "Permission denied.*name another"
        with without_root(), pytest.raises(ConfigError, match=message):
            run_folder.prepare(folder, config, {})


def test_a_folder_of_the_same_run_is_accepted(tmp_path):
    config = load_config("configs/quickstart.py")
    path = run_folder.prepare(str(tmp_path / "a" / "b"), config, {})
    assert path == run_folder.prepare(str(tmp_path / "a" / "b"), config, {})
    assert sorted(os.listdir(path)) == [".lock", ".token", "config.json"]


def test_a_damaged_description_is_refused_where_there_is_a_run(tmp_path):
    config = load_config("configs/quickstart.py")
    (tmp_path / "config.json").write_text("{")
    run_folder.prepare(str(tmp_path), config, {})  # no checkpoint: nothing to mix up
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    run_folder.prepare(str(tmp_path), config, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be used"):
        run_folder.prepare(str(tmp_path), config, {})


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes.md\) and no run"):
        run_folder.prepare(str(tmp_path), load_config("configs/quickstart.py"), {})
    assert os.listdir(tmp_path) == ["notes.md"]


def test_other_data_of_the_same_name_are_another_run(tmp_path):
    config = load_config("configs/quickstart.py")
    run_folder.prepare(str(tmp_path), config, {"train_examples": 100})
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="train_examples is 100 there and 5000 here"):
        run_folder.prepare(str(tmp_path), config, {"train_examples": 5000})


def test_what_other_processes_may_be_reading_is_written_only_if_it_changes(tmp_path):
    config = load_config("configs/quickstart.py")
    files = [tmp_path / "config.json", tmp_path / "classes.txt"]
    run_folder.prepare(str(tmp_path), config, {}, ["bag", "shoe"])
    for file in files:
        os.utime(file, (0, 0))
    run_folder.prepare(str(tmp_path), config, {}, ["bag", "shoe"])
    assert not any(file.stat().st_mtime for file in files)
    run_folder.prepare(str(tmp_path), config, {"num_classes": 2}, ["bag", "boot"])
    assert all(file.stat().st_mtime for file in files)
    assert json.loads(files[0].read_text())["num_classes"] == 2


def test_classes_keep_their_numbers(tmp_path):
    config = load_config("configs/quickstart.py")
    run_folder.prepare(str(tmp_path), config, {}, ["bag", "shoe"])
    run_folder.prepare(str(tmp_path), config, {}, ["bag", "boot"])  # nothing is saved
    assert (tmp_path / "classes.txt").read_text() == "bag\nboot\n"
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    with pytest.raises(ConfigError, match="class 1 is boot there and shoe here"):
        run_folder.prepare(str(tmp_path), config, {}, ["bag", "shoe"])


def test_a_finished_run_keeps_its_folder_without_checkpoints(tmp_path):
    run_folder.prepare(str(tmp_path), load_config("configs/quickstart.py"), {})
    run_folder.write_result(str(tmp_path), {"top1_error": 10.0})
    with pytest.raises(ConfigError, match="model is 'vitc_tiny' there and 'vitp_tiny' here"):
        run_folder.prepare(str(tmp_path), load_config("configs/quickstart.py:vitp"), {})


def test_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="gs://bucket/run is not a folder: mount the bucket"):
        run_folder.prepare("gs://bucket/run", load_config("configs/quickstart.py"), {})
