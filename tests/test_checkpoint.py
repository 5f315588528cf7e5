"""Checkpoints: exact, complete, and never silently wrong."""

import contextlib
import errno
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convstem_jax import checkpoint, checksums, commits
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.errors import CheckpointError, NotFiniteError, StorageError
from convstem_jax.sharding import Sharding
from convstem_jax.step import TrainState

# Reads of damaged files that Orbax has given up would be reported at the end, over pages.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "blocks": {i: {"kernel": jnp.array(rng.normal(size=(17, 9)), jnp.float32)} for i in (0, 1)},
        "bias": jnp.array(rng.normal(size=5), jnp.float32),
    }
    stats = {"mean": jnp.array(rng.normal(size=5), jnp.float32)}
    ema = {"params": params, "batch_stats": stats}
    return TrainState(jnp.array(seed, jnp.int32), params, stats, {"mu": params}, ema)


# When a read fails, Orbax leaves TensorStore's other reads without an event loop to report to.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (np.asarray(x) == np.asarray(y)).all()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def write(directory, errors, keep=2):
    checkpoints = Checkpoints(str(directory), keep=keep)
    for step, error in errors.items():
        metrics = None if error is None else {"top1_error": error}
        checkpoints.save(step, make_state(step), {"seconds": 1.5}, metrics)
    checkpoints.close()


def test_round_trip_is_exact(tmp_path):
    write(tmp_path / "c", {3: 50.0})
    checkpoints = Checkpoints(str(tmp_path / "c"))
    state, loop = checkpoints.restore(make_state(0))
    assert same(state, make_state(3)), "the restored arrays, types or tree differ"
    assert loop == {"seconds": 1.5}
    checkpoints.close()


@pytest.mark.parametrize("num_sessions", [1, 6])
def test_the_latest_and_the_best_are_kept(tmp_path, num_sessions):
    errors = {1: 50.0, 2: 30.0, 3: None, 4: 40.0, 5: 45.0, 6: None}
    for own in [errors] if num_sessions == 1 else [{step: e} for step, e in errors.items()]:
        write(tmp_path / "c", own)
    kept = sorted(int(name) for name in os.listdir(tmp_path / "c") if name.isdigit())
    assert kept == [2, 5, 6], "expected the best (2) and the two latest (5, 6)"
    checkpoints = Checkpoints(str(tmp_path / "c"))
    assert checkpoints.latest_step() == 6
    assert same(checkpoints.restore_weights(step=2)[1]["params"], make_state(2).params)
    checkpoints.close()


def test_few_programs_of_a_save_wait_on_a_device_at_once(monkeypatch):
    waiting, most, sum_words, device_get = [0], [0], checksums._sum_words, jax.device_get

    def count(x):
        waiting[0] += 1
        most[0] = max(most[0], waiting[0])
        return sum_words(x)

    def get(found):
        waiting[0] = 0
        return device_get(found)

    monkeypatch.setattr(checksums, "_sum_words", count)
    monkeypatch.setattr(jax, "device_get", get)
    arrays = {f"{i:02}": jnp.full(3, float(i)) for i in range(20)}
    sums, finite = checksums.inspect(arrays)
    words = np.arange(20, dtype=np.float32).view(np.uint32).astype(np.uint64)
    assert list(sums.values()) == (3 * words % 2**32).tolist() and finite
    assert most[0] == checksums.MAX_WAITING < 32


def test_orbax_is_given_no_arrays_on_devices(tmp_path, monkeypatch):
    """Its Python would take twice as long, and programs on several devices could wait for ever."""
    saved, save = [], checkpoint._Manager.save
    monkeypatch.setattr(
        checkpoint._Manager,
        "save",
        lambda self, step, args, **kwargs: (
            saved.append(args["state"].item),
            save(self, step, args=args, **kwargs),
        )[1],
    )
    sharding = Sharding(jax.devices()[:2])
    state = {"step": jnp.int32(1), "whole": jnp.ones((4, 3)), "split": jnp.ones((4, 3))}
    shardings = {"step": sharding.replicated, "whole": sharding.replicated, "split": sharding.batch}
    state = jax.device_put(state, shardings)
    with contextlib.closing(Checkpoints(str(tmp_path / "c"))) as checkpoints:
        checkpoints.save(1, state, {})
    assert all(type(x) is np.ndarray for x in saved[0].values())
    with contextlib.closing(Checkpoints(str(tmp_path / "c"))) as checkpoints:
        restored, _ = checkpoints.restore(state)
    assert same(restored, state)
    assert {name: x.sharding for name, x in restored.items()} == shardings


# Steps on two devices, beside a thread that always inspects the state as a save does.
BUSY = """
import os, sys, threading, time
import jax, jax.numpy as jnp
from convstem_jax import checkpoint, checksums
from convstem_jax.sharding import Sharding

split = Sharding(jax.devices()).batch
shapes = [(2, 400, 400), *[(2, 1 + i % 5, 64) for i in range(300)]]
state = [jax.device_put(jnp.zeros(shape), split) for shape in shapes]
step = jax.jit(
    lambda state: [jnp.tanh(state[0] @ state[0]), *[x + 1 for x in state[1:]]], donate_argnums=0
)
thread, start = threading.Thread(), time.perf_counter()
while time.perf_counter() - start < float(sys.argv[1]):
    state = step(state)
    if not thread.is_alive():
        thread = threading.Thread(target=checksums.inspect, args=(checkpoint._copy(state),))
        thread.start()
os._exit(0)
"""


@pytest.mark.skipif("DRILL" not in os.environ, reason="make drill runs it")
def test_steps_on_several_devices_do_not_hang_beside_a_save():
    subprocess.run(
        [sys.executable, "-c", BUSY, "60"],
        check=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"},
        timeout=120,
    )


@pytest.mark.parametrize("room", [math.inf, 0.0])
def test_saving_does_not_see_later_updates(tmp_path, monkeypatch, room):
    """The step donates the state at once, and the loop changes its record.

    Without room for a copy the arrays are on the host when `save` returns. With room nothing is
    read before; even an asynchronous save of Orbax's would return only with all arrays on the host.
    """
    go_on, inspect = threading.Event(), checksums.inspect

    def inspect_later(state):
        assert not room or go_on.wait(60)
        return inspect(state)

    monkeypatch.setattr(checksums, "inspect", inspect_later)
    checkpoints, curve = Checkpoints(str(tmp_path / "c"), room=lambda: room), [1]
    state = jax.tree.map(jnp.copy, make_state(1))
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints.save(1, state, {"curve": curve})
    jax.block_until_ready(update(state))
    curve.append(2)
    go_on.set()
    checkpoints.close()
    checkpoints = Checkpoints(str(tmp_path / "c"))
    restored, loop = checkpoints.restore(make_state(0))
    assert same(restored, make_state(1)) and loop == {"curve": [1]}
    checkpoints.close()


@pytest.mark.parametrize(
    "num_bytes, reserve, has_room",
    [(20_000, 0, True), (20_000, 1e4, False), (10_000, 0, False), (10_000, -1e4, True)],
)
def test_without_room_for_a_copy_a_save_waits_for_the_arrays(
    tmp_path, monkeypatch, capsys, num_bytes, reserve, has_room
):
    """Otherwise a step that fitted would fail at the first checkpoint."""

    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 8000, "bytes_limit": num_bytes}

    devices = jax.local_devices()
    threads, inspect = [], checksums.inspect
    monkeypatch.setattr(
        checksums,
        "inspect",
        lambda state: (threads.append(threading.current_thread()), inspect(state))[1],
    )
    room = checkpoint.room_left
    checkpoints = Checkpoints(str(tmp_path / "c"), room=lambda: room() - reserve)
    state = make_state(1)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: [*devices, Device()])
        checkpoints.save(1, state, {})
    checkpoints.save(2, state, {})
    checkpoints.close()
    assert checkpoints.latest_step() == 2
    assert all((t is threading.main_thread()) is not has_room for t in threads)
    assert ("no room" in capsys.readouterr().out) is not has_room


def test_the_loop_gets_the_interpreter_back_from_a_save(tmp_path):
    """By default a busy thread keeps it for 5 ms, and requesting a step needs it often."""
    before = sys.getswitchinterval()
    try:
        for interval in 5e-3, 1e-4:
            sys.setswitchinterval(interval)
            Checkpoints(str(tmp_path / "c")).close()
            assert sys.getswitchinterval() == pytest.approx(min(interval, 5e-4), rel=0.05)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("then", ["save", "close"])
def test_a_save_that_failed_is_told_at_the_next_call(tmp_path, then):
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, make_state(1)._replace(batch_stats={"mean": jnp.array([jnp.nan])}), {})
    with pytest.raises(NotFiniteError, match="after step 1, and is not saved"):
        if then == "save":
            checkpoints.save(2, make_state(2), {})
        else:
            checkpoints.close()
    checkpoints.close()
    assert not [name for name in os.listdir(tmp_path / "c") if name.isdigit()]


def test_what_cannot_be_deleted_stays_and_ends_no_run(tmp_path, monkeypatch, capsys):
    """Such as files that somebody else reads, on a network file system."""

    checkpoints = Checkpoints(str(tmp_path / "c"), keep=1)
    deleter = checkpoints._manager._checkpoint_deleter
    delete, failed = deleter.delete_steps, []

    def fail_once(steps):
        if steps and not failed:
            failed.append(steps)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "c/1")
        delete(steps)

    monkeypatch.setattr(deleter, "delete_steps", fail_once)
    for step in range(1, 4):
        checkpoints.save(step, make_state(step), {})
    checkpoints.close()
    assert failed and commits.whole(str(tmp_path / "c")) == {3}, "it is to be deleted later"
    assert "a checkpoint before 2 in" in capsys.readouterr().out


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    write(tmp_path / "c", {1: 1.0, 2: 2.0})
    checkpoints = Checkpoints(str(tmp_path / "c"))
    state = make_state(2)
    (path,) = (tmp_path / "c" / "2" / "state" / "d").iterdir()  # all arrays
    rng, noticed = random.Random(0), 0
    for _ in range(25):
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            restored, _ = checkpoints.restore(state)
            assert same(restored, state), "a flipped bit was restored silently"
        except CheckpointError as error:
            noticed += 1
            assert "2 is damaged" in str(error) and "go on from step 1" in str(error)
        path.write_bytes(content)
    assert noticed > 10, "the flips did not reach the arrays: the test tests nothing"
    checkpoints.close()


def test_cut_off_files_are_noticed(tmp_path):
    write(tmp_path / "c", {1: 1.0})
    (path,) = (tmp_path / "c" / "1" / "state" / "d").iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(str(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="1 is damaged: delete that folder to start again"):
        checkpoints.restore(make_state(0))
    checkpoints.close()
    write(tmp_path / "c", {2: 1.0})
    reader = Checkpoints(str(tmp_path / "c"), read_only=True)
    with pytest.raises(CheckpointError, match="1 is damaged: name one of 2 "):
        reader.restore_weights(1)
    reader.close()


@pytest.mark.parametrize(
    "reason, kind, message",
    [
        ("Input/output error", StorageError, "cannot be read now"),
        ("No space left on device", CheckpointError, "is damaged"),
        ("Too many open files", CheckpointError, "cannot be read by this process"),
        ("RESOURCE_EXHAUSTED: Out of memory", CheckpointError, "cannot be read by this process"),
    ],
)
def test_what_is_no_damage_is_told_from_it(tmp_path, monkeypatch, reason, kind, message):
    """In TensorStore's words; a loop that restarts runs relies on the exit status."""

    def fail(*unused_args, **unused_kwargs):
        spec = "[tensorstore_spec='" + "y" * 300 + "'] [os_error_code='N']"
        raise ValueError(f"Failed writing {'x/' * 300}: {reason} {spec}")

    write(tmp_path / "c", {1: 1.0})
    checkpoints = Checkpoints(str(tmp_path / "c"))
    monkeypatch.setattr(checkpoints._manager, "save", fail)
    monkeypatch.setattr(checkpoints._manager, "close", fail)  # of a save that was under way
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(kind, match=f"saving to .*last checkpoint .*{reason}") as raised:
        checkpoints.close()
    assert raised.value.exit_status == (75 if kind is StorageError else 4)
    checkpoints = Checkpoints(str(tmp_path / "c"))
    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(kind, match=message):
        checkpoints.restore(make_state(0))
    checkpoints.close()


def test_another_type_or_shape_is_refused(tmp_path):
    write(tmp_path / "c", {1: 1.0})
    checkpoints = Checkpoints(str(tmp_path / "c"))
    like = make_state(0)
    for wrong in (
        like._replace(step=jnp.zeros((), jnp.float32)),
        like._replace(batch_stats={"mean": jnp.zeros(6)}),
        like._replace(batch_stats={"average": jnp.zeros(5)}),
    ):
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            checkpoints.restore(wrong)
    checkpoints.close()


def test_no_folder_is_renamed(tmp_path, monkeypatch):
    """A bucket may rename it file by file: a machine that dies meanwhile leaves half a folder."""
    rename, renamed = os.rename, []
    monkeypatch.setattr(
        os, "rename", lambda *paths: renamed.append(os.path.isdir(paths[0])) or rename(*paths)
    )
    write(tmp_path / "c", {1: 1.0})
    assert not any(renamed)


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path):
    write(tmp_path / "c", {1: 1.0})
    unfinished = tmp_path / "c" / "2"
    shutil.copytree(tmp_path / "c" / "1", unfinished)
    (unfinished / commits.FILE).unlink()
    mine = [tmp_path / "c" / name for name in ("mine", "007")]
    for folder in mine:
        folder.mkdir()
    (tmp_path / "c" / "8").symlink_to(mine[0])
    reader = Checkpoints(str(tmp_path / "c"), read_only=True)
    assert reader.latest_step() == 1 and same(reader.restore(make_state(0))[0], make_state(1))
    reader.close()
    assert unfinished.exists(), "reading a run destroys what it is saving"
    checkpoints = Checkpoints(str(tmp_path / "c"))
    assert checkpoints.latest_step() == 1
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert not unfinished.exists(), "leftovers of a killed save pile up"
    assert all(folder.exists() for folder in mine) and (tmp_path / "c" / "8").exists()


def test_an_unfinished_save_that_cannot_be_removed_ends_no_run(tmp_path, monkeypatch, capsys):
    write(tmp_path / "c", {1: 1.0})
    (tmp_path / "c" / "2").mkdir()
    monkeypatch.setattr(shutil, "rmtree", mock.Mock(side_effect=OSError("busy")))
    checkpoints = Checkpoints(str(tmp_path / "c"))
    assert checkpoints.latest_step() == 1
    checkpoints.close()
    assert "c/2, an unfinished checkpoint, stays: OSError: busy" in capsys.readouterr().out


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("asks", ["stat", "exists"])
def test_storage_that_does_not_answer_costs_no_checkpoint(tmp_path, monkeypatch, asks, step):
    """We ask by os.stat; Orbax asks by os.path.exists, which says that such a file is not there."""
    write(tmp_path / "c", {1: 1.0, 2: 2.0})
    ask = {"stat": os.stat, "exists": os.path.exists}[asks]
    fails = str(tmp_path / "c" / str(step) / commits.FILE)

    def fail(path, *args, **kwargs):
        if os.fspath(path) != fails:
            return ask(path, *args, **kwargs)
        if asks == "exists":
            return False
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patch:
        patch.setattr(os if asks == "stat" else os.path, asks, fail)
        for read_only in (False, True):
            with pytest.raises(StorageError):
                Checkpoints(str(tmp_path / "c"), read_only=read_only)
    checkpoints = Checkpoints(str(tmp_path / "c"))
    assert checkpoints.latest_step() == 2 and commits.whole(str(tmp_path / "c")) == {1, 2}
    checkpoints.close()


def test_damaged_metrics_are_told(tmp_path):
    write(tmp_path / "c", {1: 1.0, 2: 2.0})
    (tmp_path / "c" / "1" / "metrics" / "metrics").write_text("")
    with pytest.raises(CheckpointError, match="c/1 is damaged: delete that folder"):
        Checkpoints(str(tmp_path / "c"))


def test_what_a_run_deletes_while_it_is_read_is_not_damaged(tmp_path):
    write(tmp_path / "c", {1: 1.0, 2: 2.0})
    reader = Checkpoints(str(tmp_path / "c"), read_only=True)
    shutil.rmtree(tmp_path / "c" / "2")
    with pytest.raises(StorageError, match="2 has just been deleted by its run: try again"):
        reader.restore_weights()
    reader.close()
