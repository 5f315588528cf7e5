"""The command line: what it accepts, and that it refuses the rest before compiling anything."""

import argparse
from concurrent.futures.process import BrokenProcessPool
import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from convstem_jax import (
    command_line,
    commits,
    evaluate,
    launch_local,
    predict,
    preflight,
    provenance,
    train,
)
from convstem_jax.config import load_config
from convstem_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NotFiniteError,
    Preempted,
    StorageError,
)
from convstem_jax.main import main

QUICK = ["--config", "configs/quickstart.py"]


def test_a_program_begins_before_the_imports_that_take_seconds():
    """A program is a module of the package, so the package is imported first."""
    code = "import sys, convstem_jax; assert 'jax' not in sys.modules; convstem_jax.create_model"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_process_imports_no_training():
    code = "import runpy, sys; runpy.run_module('convstem_jax.main', run_name='__mp_main__')\n"
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def no_compilation(monkeypatch):
    """Fails the test where anything is compiled: errors must come before that."""

    def fail(*args, **kwargs):
        raise AssertionError("something was compiled before the error")

    monkeypatch.setattr(jax, "jit", fail)


def one_error(capsys):
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "Traceback" not in error
    # Only the commands that prepare a data set, and the quick-start, have lines of their own.
    assert all(
        line.startswith("  python ") or "quick-start" in line for line in error.split("\n")[1:]
    )
    return error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.lrr=1"], "unknown config field 'lrr': did you mean 'lr'"),
        (["--config.lr=nan"], "config.lr=nan: it must be a number above 0"),
        (["--config.batch_size=ten"], "config.batch_size=ten: it must be a whole number"),
        (["--config.batch_size=100"], "config.batch_size=100 is not divisible by 8 devices"),
        (
            ["--config.data_dir=/nonexistent"],
            "must be there as fashion_mnist_10k/VERSION/dataset_info.json",
        ),
        (
            ["--config.data_dir=/nonexistent", "--config.dataset=cifar10"],
            "tfds.builder('cifar10', data_dir='/nonexistent'",
        ),
        (["--config.eval_split=validation"], "has no split 'validation': it has test, train"),
        (["--workdir=/proc/nowhere"], "--workdir /proc/nowhere cannot be used"),
    ],
)
def test_errors_are_one_line_with_status_2(flags, message, no_compilation, capsys, tmp_path):
    assert main([*QUICK, f"--workdir={tmp_path}/run", *flags]) == 2
    assert message in one_error(capsys)


def test_a_work_directory_that_cannot_be_written(no_compilation, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([*QUICK, f"--workdir={tmp_path}/file"]) == 2
    assert "cannot be used" in one_error(capsys)


def test_imagenet_that_is_not_there_names_the_remedy(no_compilation, capsys, tmp_path):
    flags = [f"--config.data_dir={tmp_path}", f"--workdir={tmp_path}/run"]
    assert main(["--config", "configs/vitc.py", *flags]) == 2
    message = one_error(capsys)
    assert "'imagenet2012' is not in" in message
    assert (
        f"launch/prepare_imagenet.py --manual_dir FOLDER_OF_THE_TWO_TAR_FILES --data_dir {tmp_path}"
        in message
    )
    assert "convstem_jax.main --config configs/quickstart.py" in message


def test_an_image_size_that_does_not_fit_the_model(no_compilation, capsys, tmp_path):
    flags = ["--config.image_size=30", f"--workdir={tmp_path}/run"]
    assert main([*QUICK, *flags]) == 2
    assert "image size 30 is not a multiple of patch size 8" in one_error(capsys)


def test_processes_meet_before_a_configuration_file_may_use_jax(monkeypatch, capsys):
    calls = []

    def load_config(spec):
        calls.append(spec)
        raise ConfigError("enough")

    monkeypatch.setattr(command_line.processes, "start", lambda *args: calls.append(args))
    monkeypatch.setattr(command_line, "load_config", load_config)
    assert main(["--config", "configs/quickstart.py", "--processes=1"]) == 2
    assert calls == [(None, 1, None), "configs/quickstart.py"]


def test_damaged_data_has_status_3(no_compilation, capsys, tmp_path):
    shutil.copytree("datasets/fashion_mnist_10k", tmp_path / "fashion_mnist_10k")
    file = next(tmp_path.rglob("*test.array_record*"))
    file.write_bytes(file.read_bytes()[: 1 << 16])
    flags = [f"--config.data_dir={tmp_path}", f"--workdir={tmp_path}/run"]
    assert main([*QUICK, *flags]) == 3
    assert file.name in one_error(capsys)


def test_the_folder_of_another_run_is_refused(no_compilation, capsys, tmp_path):
    config = json.loads(load_config("configs/quickstart.py").to_json())
    data = {"train_examples": 10_000, "eval_examples": 2_000, "num_classes": 10}
    saved = config | data | {"lr": 7.0, "num_threads": 5}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "100" / commits.FILE).touch()
    assert main([*QUICK, f"--workdir={tmp_path}"]) == 2
    message = one_error(capsys)
    assert "lr is 7.0 there and 0.002 here" in message
    assert "num_threads" not in message, "a field that changes no result must not count"


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--config"),
        ([*QUICK, "extra"], "unexpected argument 'extra'"),
        ([*QUICK, "--lr=1"], "unexpected argument '--lr=1': fields are set by --config.FIELD"),
        ([*QUICK, "--config.lr"], "--config.lr has no value"),
    ],
)
def test_wrong_flags_have_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_field_may_have_spaces_and_stand_anywhere():
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    args, fields = command_line.parse(
        parser, ["--config.data_dir=/my data", "run", "--config.mean=(0.1, 0.2, 0.3)"]
    )
    assert args.weights == "run"
    assert fields == {"data_dir": "/my data", "mean": "(0.1, 0.2, 0.3)"}


def test_the_commit_is_of_this_project_alone(monkeypatch, tmp_path):
    """A package installed inside another repository is no part of it."""
    monkeypatch.setenv("CONVSTEM_COMMIT", "of the image")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "other.txt").write_text("")
    for command in ("init -q", "add other.txt", "-c user.name=A -c user.email=a commit -qm A"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    assert provenance.commit() == "of the image"


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (preflight, ["--num_examples", "0"], "--num_examples: '0' must be a whole number of 1"),
        (predict, ["--top", "0"], "--top: '0' must be a whole number of 1 or more"),
        (launch_local, ["--processes", "many"], "--processes: 'many' must be a whole number"),
    ],
)
def test_counts_are_checked(program, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.usefixtures("no_compilation")
def test_a_run_outlives_who_reads_its_output(monkeypatch, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        monkeypatch.setattr(sys, "stderr", nobody)
        assert main([*QUICK, "--config.lr=nan", f"--workdir={tmp_path}/run"]) == 2


def test_help_shows_examples_and_exit_status(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "configs/quickstart.py" in text and "exit status" in text and "--workdir" in text


def test_a_traceback_is_shown_when_asked_for(no_compilation, capsys, tmp_path):
    """The exit status, on which launch scripts rely, stays the same."""
    flags = ["--config.lr=nan", "--traceback", f"--workdir={tmp_path}/run"]
    assert main([*QUICK, *flags]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_run_is_named_after_the_configuration():
    fields = {"lr": "1e-3", "dtype": "x/y", "num_workers": "3"}  # the last changes no result
    name = command_line.default_workdir("configs/vitc.py:18gf,sgd", fields)
    assert pathlib.PurePath(name).parts == ("runs", "vitc_18gf_sgd_dtype=x_y_lr=1e-3")
    again = "configs/vitc.py:sgd,num_workers=4,18gf,lr=1e-3"
    assert command_line.default_workdir(again, {"dtype": "x/y"}) == name


@pytest.mark.parametrize(
    ("env", "flags", "expected"),
    [
        (None, [], os.path.expanduser("~/.cache/convstem_jax")),
        ("elsewhere", [], "elsewhere"),
        ("elsewhere", ["--compilation_cache=~/there"], os.path.expanduser("~/there")),
        ("elsewhere", ["--compilation_cache="], None),
    ],
)
def test_where_compiled_programs_are_kept(env, flags, expected, monkeypatch):
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    found, before = [], [getattr(jax.config, name) for name in names]
    if env:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", env)
    else:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(
        train, "train", lambda *_: found.extend(getattr(jax.config, name) for name in names)
    )
    try:
        assert main([*QUICK, *flags]) == 0
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)
    assert found == [expected, 0], "small programs are kept too"


@pytest.mark.parametrize("program", [evaluate.main, predict.main])
def test_programs_that_use_weights_keep_theirs_too(program, monkeypatch):
    calls = []
    monkeypatch.setattr(command_line, "keep_programs", lambda *args: calls.append(args))
    program(["nowhere", "--config=configs/quickstart.py"] + ["x.png"] * (program is predict.main))
    assert calls == [()]


@pytest.mark.parametrize("kind", [ConfigError, DataError, OSError])
def test_storage_that_does_not_answer_is_worth_another_try(kind, monkeypatch, capsys):
    def fail(*args):
        raise kind("why") from OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(train, "train", fail)
    assert main([*QUICK]) == 75
    assert re.search(
        "why.*storage did not|storage did not.*why", capsys.readouterr().err, re.DOTALL
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to …"),
            2,
            "config.state_sharding=fsdp.*RESOURCE_EXHAUSTED",
        ),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -15."),
            75,
            "reads the data was ended by signal 15: the same command goes on",
        ),
        (
            RuntimeError("Worker process was terminated unexpectedly with exit code -7."),
            75,
            "signal 7, .*/dev/shm is full .lower config.num_workers.*: the same command goes on",
        ),
        (
            BrokenProcessPool("A process in the process pool was terminated abruptly"),
            75,
            "reads the data was ended, .* memory .*: the same command goes on",
        ),
    ],
)
def test_what_others_say_is_told_with_its_remedy(error, status, message, monkeypatch, capsys):
    def fail(*args):
        raise error

    monkeypatch.setattr(train, "train", fail)
    assert main([*QUICK]) == status
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


@pytest.mark.parametrize(
    "kind, status",
    [
        (ConfigError, 2), (DataError, 3), (CheckpointError, 4), (NotFiniteError, 5),
        (Preempted, 75), (StorageError, 75),
    ],
)  # fmt: skip
def test_every_error_has_its_exit_status(kind, status, monkeypatch, capsys):
    def fail(*args):
        raise kind("why")

    monkeypatch.setattr(train, "train", fail)
    assert main([*QUICK]) == status
    assert capsys.readouterr().err == ("why\n" if kind is Preempted else "error: why\n")
