"""The folder of a run."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

import pytest

from convstem_jax import commits, run_folder
from convstem_jax.config import load_config
from convstem_jax.errors import ConfigError
from convstem_jax.models import MODELS


@contextlib.contextmanager
def without_root():
    """Gives up root's right to write everywhere, where the tests run as root."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


def prepare(folder, *about):
    return run_folder.prepare(str(folder), *about)


def saved(folder):
    (folder / "checkpoints/5").mkdir(parents=True)
    (folder / "checkpoints/5" / commits.FILE).touch()


def test_the_first_save_if_it_was_cut_off_is_nothing_that_could_be_mixed_up(tmp_path):
    saved(tmp_path)
    assert run_folder.has_checkpoint(str(tmp_path))
    (tmp_path / "checkpoints/5" / commits.FILE).unlink()
    assert not run_folder.has_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["w[1]", "a*", "a?b", "back\\slash", "a\0b"])
def test_a_path_that_cannot_be_used_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="its path has .*: name another"):
        prepare(tmp_path / name / "run", load_config("configs/quickstart.py"), {})


def test_a_folder_that_may_not_be_written_is_refused():
    config = load_config("configs/quickstart.py")
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which only its owner may enter
        os.chmod(folder, 0o555)
        message = "Permission denied.*name another"
        with without_root(), pytest.raises(ConfigError, match=message):
            prepare(folder, config, {})


def test_a_folder_of_the_same_run_is_accepted(tmp_path):
    config = load_config("configs/quickstart.py")
    path = prepare(tmp_path / "a" / "b", config, {})
    assert path == prepare(tmp_path / "a" / "b", config, {})
    assert sorted(os.listdir(path)) == [".lock", ".token", "config.json"]


def test_a_start_that_is_cut_off_can_be_repeated(tmp_path, monkeypatch):
    config = load_config("configs/quickstart.py")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
        prepare(tmp_path, config, {})
    assert "config.json" not in os.listdir(tmp_path)
    prepare(tmp_path, config, {})


def test_a_damaged_description_is_refused_where_there_is_a_run(tmp_path):
    config = load_config("configs/quickstart.py")
    (tmp_path / "config.json").write_text("{")
    prepare(tmp_path, config, {})  # no checkpoint: nothing to mix up
    saved(tmp_path)
    prepare(tmp_path, config, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is damaged .*: restore it"):
        prepare(tmp_path, config, {})
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds checkpoints and no config.json"):
        prepare(tmp_path, config, {})
    (tmp_path / "result.json").write_text("")
    with pytest.raises(ConfigError, match="result.json is damaged .*: delete it"):
        run_folder.read_result(str(tmp_path))


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes.md\) and no run"):
        prepare(tmp_path, load_config("configs/quickstart.py"), {})
    assert os.listdir(tmp_path) == ["notes.md"]


def test_other_data_of_the_same_name_are_another_run(tmp_path):
    config = load_config("configs/quickstart.py")
    prepare(tmp_path, config, {"train_examples": 100})
    saved(tmp_path)
    with pytest.raises(ConfigError, match="train_examples is 100 there and 5000 here"):
        prepare(tmp_path, config, {"train_examples": 5000})


def test_another_network_of_the_same_name_is_another_run(tmp_path):
    config = load_config("configs/quickstart.py")
    spec = MODELS["vitc_tiny"]
    of_then, grown, other = (
        {"architecture": x}
        for x in (
            dataclasses.asdict(spec),
            dataclasses.asdict(spec) | {"dropout": 0.0},  # a field that later code has
            dataclasses.asdict(spec) | {"depth": 4},
        )
    )
    prepare(tmp_path / "old", config, {})
    saved(tmp_path / "old")
    prepare(tmp_path / "old", config, other)  # an earlier version recorded none
    assert "architecture" not in json.loads((tmp_path / "old/config.json").read_text())

    prepare(tmp_path / "new", config, of_then)
    saved(tmp_path / "new")
    prepare(tmp_path / "new", config, grown)
    with pytest.raises(ConfigError, match="of the network depth was 3 and is 4"):
        prepare(tmp_path / "new", config, other)


def test_classes_keep_their_numbers(tmp_path):
    config = load_config("configs/quickstart.py")
    prepare(tmp_path, config, {}, ["bag", "shoe"])
    prepare(tmp_path, config, {}, ["bag", "boot"])  # nothing is saved
    assert (tmp_path / "classes.txt").read_text() == "bag\nboot\n"
    saved(tmp_path)
    with pytest.raises(ConfigError, match="class 1 is boot there and shoe here"):
        prepare(tmp_path, config, {}, ["bag", "shoe"])


@pytest.mark.parametrize(
    "name, content",
    [
        ("classes.txt", b"\xff"),
        ("config.json", b"[]"),
        ("result.json", b"3"),
        ("result.json", b"{}"),
    ],
)
def test_files_that_hold_something_else_are_named(tmp_path, name, content):
    config = load_config("configs/quickstart.py")
    prepare(tmp_path, config, {}, ["bag", "shoe"])
    saved(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is damaged .*: (restore|delete) it"):
        prepare(tmp_path, config, {}, ["bag", "shoe"])


@pytest.mark.parametrize("by_another", [False, True])
def test_a_folder_that_was_deleted_is_locked_again(tmp_path, by_another):
    config = load_config("configs/quickstart.py")
    folder = prepare(tmp_path / "run", config, {})
    shutil.rmtree(folder)
    if by_another:
        os.mkdir(folder)
        pathlib.Path(folder, ".lock").touch()
    prepare(tmp_path / "run", config, {})
    with open(f"{folder}/.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_finished_run_keeps_its_folder_without_checkpoints(tmp_path):
    prepare(tmp_path, load_config("configs/quickstart.py"), {})
    run_folder.write_result(str(tmp_path), {"top1_error": 10.0})
    with pytest.raises(ConfigError, match="model is 'vitc_tiny' there and 'vitp_tiny' here"):
        prepare(tmp_path, load_config("configs/quickstart.py:vitp"), {})


def test_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="gs://bucket/run is not a folder: mount the bucket"):
        prepare("gs://bucket/run", load_config("configs/quickstart.py"), {})
