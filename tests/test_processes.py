"""Several real processes train as one: same numbers, one end, one set of files.

`make drill` runs every split of 8 devices, and more ways to stop; without it a short form stands in
for them.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

from flax import nnx
import jax
import numpy as np
import pytest

from convstem_jax import launch_local, processes, run_folder
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.errors import ConfigError, UnreachableError
from convstem_jax.metrics import read_jsonl
from convstem_jax.sharding import MIN_SIZE, Sharding, bytes_on_device
from convstem_jax.step import split_model
from convstem_jax.weights import Architecture, save

ROOT = pathlib.Path(__file__).parent.parent
NUM_STEPS = 20
# 20 steps with all that may differ between processes: BatchNorm, mixing, lighting, EMA,
# augmentation, precise statistics, and a last batch of the evaluation that is not full.
FIELDS = {
    "epochs": "0.128",
    "warmup_epochs": "0.05",
    "eval_every_epochs": "0.064",
    "ema_every": "4",
    "ema_alpha": "1e-4",
    "log_every_steps": "1",
    "checkpoint_every_steps": "7",
    "auto_augment": "true",
    "mixup_alpha": "0.8",
    "cutmix_alpha": "1.0",
    "lighting_std": "0.1",
    "precise_bn_examples": "128",
    "eval_split": "test[:500]",
    "num_workers": "0",
}
DRILL = "DRILL" in os.environ
SPLITS = ["1x8", "2x4", "4x2", "8x1", "2x4 fsdp"] if DRILL else ["2x2 fsdp"]
STOPS = [signal.SIGTERM, signal.SIGKILL] if DRILL else [signal.SIGTERM]


def test_a_process_tells_its_own_error_though_another_is_lost_meanwhile(monkeypatch):
    def lost(numbers):
        raise RuntimeError("UNAVAILABLE")

    monkeypatch.setattr(processes, "gather", lost)
    with pytest.raises(ConfigError, match="my own"), processes.together():
        raise ConfigError("my own")
    with pytest.raises(RuntimeError, match="UNAVAILABLE"), processes.together():
        pass


def flags(workdir, **fields):
    fields = FIELDS | fields
    yield from ("--config", "configs/quickstart.py", "--workdir", str(workdir))
    yield from (f"--config.{name}={value}" for name, value in fields.items())


@contextlib.contextmanager
def running(num_processes, num_devices, *flags):
    """The command of the README, with its lines as they come."""
    command = [sys.executable, "-m", "convstem_jax.launch_local", "--processes", num_processes]
    command += ["--devices_per_process", num_devices, "--", *flags]
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


def run(*args):
    """The command's exit status and output."""
    with running(*args) as process:
        output = process.stdout.read()
        return process.wait(), output


def weights(workdir):
    checkpoints = Checkpoints(str(workdir / "checkpoints"))
    found = checkpoints.restore_weights()
    checkpoints.close()
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(found)
    }


def assert_same_run(workdir, reference):
    """Losses to 1e-5, weights to 1e-3 of each array's norm, error counts exactly.

    But for the keys' biases: they change no weight of the attention, and their gradient is what
    rounding left, which AdamW enlarges to steps as large as any other's.
    """
    records, expected = (read_jsonl(str(d / "metrics.jsonl")) for d in (workdir, reference))
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    for ours, theirs in zip(records, expected, strict=True):
        if ours["kind"] == "train":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours
        else:
            assert ours["ema_top1_error"] == theirs["ema_top1_error"]
            assert ours["raw_top1_error"] == theirs["raw_top1_error"]
    ours, theirs = weights(workdir), weights(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name in ours:
        a, b = ours[name], theirs[name]
        if name.endswith("['qkv']['bias']"):
            a, b = (np.delete(x.reshape(3, -1), 1, axis=0) for x in (a, b))
        assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b) + 1e-6, name
    assert json.loads((workdir / "result.json").read_text())["examples"] == 500


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNAVAILABLE: heartbeat timeout"), True),
        (ValueError("another mistake"), False),
        (OSError(5, "Input/output error"), False),
        (TimeoutError("Sync timed out"), False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(monkeypatch, error, lost):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.is_lost_peer(error) is lost
    wrapped = TimeoutError("Sync timed out")  # as Orbax does
    wrapped.__cause__ = RuntimeError("heartbeat timeout")
    assert processes.is_lost_peer(wrapped)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert not processes.is_lost_peer(wrapped)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one_device") / "run"
    status, output = run(1, 1, *flags(workdir))
    assert status == 0, output
    assert len(read_jsonl(str(workdir / "metrics.jsonl"))) == NUM_STEPS + 2
    return workdir


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_of_the_devices_trains_alike(split, one_device, tmp_path):
    devices, _, state = split.partition(" ")
    num_processes, num_devices = map(int, devices.split("x"))
    command = flags(tmp_path, state_sharding=state or "replicated")
    status, output = run(num_processes, num_devices, *command)
    assert status == 0, output
    assert f"on {num_processes * num_devices} x cpu" in output
    assert output.count("step 20/20  epoch 0.1  loss") == 1, "only process 0 prints"
    assert_same_run(tmp_path, one_device)


def child(process, number):
    """The process ID of one of the processes of a run."""
    import psutil

    for found in psutil.Process(process.pid).children():
        words = found.cmdline()
        if "--process" in words and words[words.index("--process") + 1] == str(number):
            return found.pid
    raise AssertionError(f"no process {number}")


def test_what_stops_one_process_stops_all_and_nothing_is_lost(one_device, tmp_path):
    """SIGTERM to one process, or its loss; each time the next start continues the run."""

    def stop_at(step, number, signum, *args):
        with running(*args, *flags(tmp_path)) as process:
            output, sent = "", False
            for line in process.stdout:
                output += line
                if not sent and line.startswith("step") and int(line.split()[1][:-3]) >= step:
                    os.kill(child(process, number), signum)
                    sent = True
            return process.wait(), output

    step = 3
    for stop in STOPS:
        status, output = stop_at(step, 1, stop, 2, 1)
        assert status == 75 and ("resumed from step" in output) == (step > 3), output
        if stop == signal.SIGKILL:
            assert "process 1 was ended by signal 9" in output
            continue
        stopped = set(re.findall(r"stopped at step (\d+) of 20, which is saved", output))
        assert len(stopped) == 1, "all processes stop at the same step"
        step = int(stopped.pop()) + 4
    status, output = run(1, 2, *flags(tmp_path, state_sharding="fsdp"))
    assert status == 0 and "resumed from step" in output, output
    assert_same_run(tmp_path, one_device)


@pytest.mark.skipif(not DRILL, reason="make drill runs it")
def test_several_processes_start_from_the_weights_of_a_run(one_device, tmp_path):
    command = flags(tmp_path, init_from=str(one_device), lr="1e-9", precise_bn_examples="0")
    status, output = run(2, 1, *command)
    assert status == 0 and re.search(r"the other \d+ +loaded", output), output
    ours, theirs = weights(tmp_path), weights(one_device)
    name = "[0]['params']['stem']['projection']['kernel']"
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)


AT_HOME = """
import os, sys

os.environ["HOME"] = {home!r}
from convstem_jax import main

sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("there", [False, True])
def test_all_processes_must_have_the_same_weights_to_start_from(there, tmp_path, monkeypatch):
    architecture = Architecture("vitc_tiny", num_classes=10, image_size=32)
    for seed, home in enumerate([tmp_path / "first", tmp_path / "other"]):
        home.mkdir()
        _, *found = split_model(architecture.build(rngs=nnx.Rngs(seed)))
        if there or not seed:
            start = dict(zip(("params", "batch_stats"), found, strict=True))
            save(str(home / "start.safetensors"), start, architecture)
    statuses, outputs = start_two_at_homes(tmp_path, monkeypatch, "~/start.safetensors")
    assert statuses == [2, 2], outputs
    if there:
        message = "process 1 has other weights in ~/start.safetensors than process 0"
        assert all(message in output for output in outputs)
    else:
        assert "process 1 of the run failed" in outputs[0]
        assert "config.init_from: " in outputs[1] and "is not there" in outputs[1]


@pytest.mark.skipif(not DRILL, reason="make drill runs it")
def test_a_run_to_start_from_may_be_damaged_on_one_machine(one_device, tmp_path, monkeypatch):
    for home in (tmp_path / "first", tmp_path / "other"):
        shutil.copytree(one_device, home / "run")
    large = max((tmp_path / "other/run/checkpoints/20").rglob("d/*"), key=os.path.getsize)
    os.truncate(large, 100)
    statuses, outputs = start_two_at_homes(tmp_path, monkeypatch, "~/run")
    assert statuses == [4, 4], outputs
    assert "process 1 of the run failed" in outputs[0] and "is damaged" in outputs[1]


def start_two_at_homes(folder, monkeypatch, init_from):
    """`start_two`, one process with its home in `folder/first`, the other in `folder/other`."""
    monkeypatch.setenv("HOME", str(folder / "first"))
    command = [*flags(folder / "run", init_from=init_from)]
    program = ["-c", AT_HOME.format(home=str(folder / "other"))]
    return start_two([command, command], program)


@pytest.mark.skipif(not DRILL, reason="make drill runs it")
def test_a_loss_that_is_not_finite_ends_all_processes(tmp_path):
    command = flags(tmp_path, lr="1e20", checkpoint_every_steps="100")
    status, output = run(2, 1, *command)
    assert status == 5 and output.count("the training loss is nan") == 2, output


def start_two(flags_of, program=("-m", "convstem_jax.main")):
    """Starts two processes with flags of their own; returns their statuses and outputs.

    `program` is what Python runs as process 1.
    """
    cluster = ["--coordinator", launch_local.free_address(), "--processes", "2", "--process"]
    started = [
        subprocess.Popen(
            [sys.executable, *words, *cluster, str(i), *flags_of[i]],
            cwd=ROOT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, words in enumerate([("-m", "convstem_jax.main"), program])
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], outputs


DIES_AT = """
import os, sys
from convstem_jax import {module}, main, processes

def die(*args, **kwargs):
    os.kill(os.getpid(), 9)

{module}.{name} = die
main.main(sys.argv[1:])
"""
PLACES = [("checksums", "inspect")]  # before the checksums of a restored state are compared
if DRILL:
    PLACES += [("checkpoint", "Checkpoints._read"), ("checkpoint", "Checkpoints.save")]
    PLACES += [("run_folder", "prepare"), ("train", "evaluate")]


@pytest.mark.parametrize("module, name", PLACES)
def test_a_process_that_is_lost_is_no_damaged_checkpoint(module, name, one_device, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one_device, workdir)
    (workdir / "result.json").unlink()
    if name == "Checkpoints.save":  # there must be something left to save
        shutil.rmtree(workdir / "checkpoints/20")
    dies = ["-c", DIES_AT.format(module=module, name=name)]
    statuses, outputs = start_two([flags(workdir), flags(workdir)], dies)
    assert statuses == [75, -signal.SIGKILL], outputs[0]
    assert "another process of the run was lost" in outputs[0]


@pytest.mark.parametrize("other", [{"lr": "0.1"}, {"warmup_epochs": "99"}])
def test_processes_with_different_commands_are_refused(other, tmp_path):
    """Even if the other is wrong by itself."""
    statuses, outputs = start_two([flags(tmp_path), flags(tmp_path, **other)])
    assert statuses == [2, 2], outputs
    for output in outputs:
        assert "process 1 has another configuration than process 0" in output


OTHER = """
import sys
from convstem_jax import checkpoint, main
from convstem_jax.data import sources

{name} = lambda self: {value}
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not DRILL, reason="make drill runs it")
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("sources.Split.fingerprint", "'other'", "process 1 has another fashion_mnist_10k"),
        ("checkpoint.Checkpoints.latest_step", "None", "process 1 does not see the checkpoints"),
    ],
)
def test_processes_that_see_other_files_are_refused(name, value, message, one_device, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one_device, workdir)
    (workdir / "result.json").unlink()
    other = ["-c", OTHER.format(name=name, value=value)]
    statuses, outputs = start_two([flags(workdir), flags(workdir)], other)
    assert statuses == [2, 2], outputs
    assert all(message in output for output in outputs)


def test_the_others_end_as_one_for_which_storage_did_not_answer(monkeypatch):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes, "gather", lambda numbers: (told.append(numbers), np.zeros((2, 1)))[1]
    )
    with pytest.raises(ConfigError), processes.together():
        raise ConfigError("cannot be used") from OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    assert told == [[75]]


def test_an_error_in_one_process_ends_the_other_with_the_same_status(tmp_path):
    statuses, outputs = start_two([flags(tmp_path / "a"), flags("/proc/nowhere")])
    assert statuses == [2, 2]
    assert "process 1 of the run failed" in outputs[0] and "cannot be used" in outputs[1]


FAILS_AT_ITS_CHECKPOINTS = """
import errno, os, sys
from convstem_jax import commits, main, processes

def fail(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

commits.check_metrics = fail
processes.leave(main.main(sys.argv[1:]))
"""


def test_storage_that_does_not_answer_one_process_ends_both(tmp_path):
    flags_of = [flags(tmp_path / "run") for _ in range(2)]
    statuses, outputs = start_two(flags_of, ["-c", FAILS_AT_ITS_CHECKPOINTS])
    assert statuses == [75, 75], outputs
    assert "process 1 of the run failed" in outputs[0] and "Input/output error" in outputs[1]


def test_a_work_directory_that_is_not_shared_is_refused(tmp_path):
    statuses, outputs = start_two([flags(tmp_path / "a"), flags(tmp_path / "b")])
    assert statuses == [2, 2], outputs
    assert "process 1 does not see what process 0 wrote" in outputs[0]


@pytest.mark.parametrize(
    "args, message",
    [
        (("localhost:1", None, None), "belong together"),
        ((None, 2, None), "belong together"),
        (("localhost:1", 2, 2), "--process 2 must be from 0 to 1"),
        (("localhost", 2, 1), "--coordinator localhost must be HOST:PORT"),
        (("localhost:70000", 2, 1), "--coordinator localhost:70000 must be HOST:PORT"),
        (("localhost:1", 2, -1), "--process -1 must be from 0 to 1"),
        ((None, 1, 7), "--process 7 must be from 0 to 0"),
    ],
)
def test_wrong_addresses_are_refused(args, message):
    with pytest.raises(ConfigError, match=message):
        processes.start(*args)


def test_without_a_cluster_a_process_is_alone():
    processes.start(None, None, None)
    processes.start(None, 1, None)
    assert jax.process_count() == 1 and not jax.distributed.is_initialized()


def test_one_task_of_slurm_has_all_its_gpus(monkeypatch):
    """JAX would join it to no other process, and leave it only the first GPU."""
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: joined.append(args))
    processes.start(None, None, None)
    assert not joined
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")  # mpirun within the task
    processes.start(None, None, None)
    assert joined


def test_a_coordinator_that_does_not_answer(monkeypatch, capsys):
    """JAX would abort the process after five minutes."""
    monkeypatch.setattr(processes, "REACH_SECONDS", 0)
    with pytest.raises(UnreachableError, match="nothing answers at --coordinator localhost:1 "):
        processes.start("localhost:1", 2, 1)
    assert "meeting the other processes at localhost:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "statuses, status",
    [
        ([0, 0], 0),
        ([0, -9], 75),
        ([130, 0], 130),
        ([75, 3], 3),
        ([130, -6], 130),
        ([-2, -2], 130),
        ([75, 130], 130),
        ([-15, -15], 75),
        ([1, 75], 1),
        ([5, 2], 2),
    ],
)
def test_the_status_of_a_run_says_what_to_do(statuses, status):
    assert launch_local.exit_status(statuses) == status


def test_a_folder_in_use_is_refused(tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        file.write("123")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use by process 123: stop that"):
            run_folder._lock(str(tmp_path))
    run_folder._lock(str(tmp_path))
    run_folder._lock(str(tmp_path))  # this process may, as often as it likes


def test_fsdp_splits_what_is_large_along_its_longest_axis_that_divides():
    sharding = Sharding(jax.devices(), "fsdp")
    for shape, spec in {
        (768, 3072): jax.P(None, "data"),
        (3072, 768): jax.P("data"),
        (1001, 768): jax.P(None, "data"),
        (1001, 767): jax.P(),
        (MIN_SIZE - 8,): jax.P(),
        (MIN_SIZE,): jax.P("data"),
    }.items():
        x = jax.ShapeDtypeStruct(shape, "float32")
        assert sharding.of_state({"x": x})["x"].spec == spec, shape
        assert Sharding(jax.devices()).of_state(x).spec == jax.P()


def test_fsdp_takes_a_part_of_the_memory_of_each_device():
    num = len(jax.devices())
    large, small = np.zeros((num * MIN_SIZE,), np.float32), np.zeros((num,), np.float32)
    for state, divisor in (("replicated", 1), ("fsdp", num)):
        shardings = Sharding(jax.devices(), state).of_state([large, small])
        arrays = jax.device_put([large, small], shardings)
        assert bytes_on_device(arrays) == large.nbytes / divisor + small.nbytes
