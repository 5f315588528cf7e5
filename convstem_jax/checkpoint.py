"""Checkpoints of a run; the only file that knows Orbax.

A checkpoint is one step: the `TrainState`, and a small JSON record. Its number is also the state
of the input, whose batches are numbered. Saving is asynchronous and atomic. Orbax restores flipped
bits silently, so the JSON record holds a checksum of each array.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import copy
import os
import shutil
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from convstem_jax import checksums, commits, processes
from convstem_jax.errors import (
    CheckpointError,
    NotFiniteError,
    StorageError,
    first_line,
    is_of_this_process,
    is_passing,
    lacking,
)
from convstem_jax.sharding import bytes_on_device, room_left
from convstem_jax.step import PyTree, by_name


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, made to leave requests to stop to the training loop."""

    def reached_preemption(self, step: int) -> bool:
        # JAX stops processes at the number after the largest that any of them asked about. The loop
        # asks with numbers of its own, and would never reach one after Orbax's.
        return False


class Checkpoints:
    """The checkpoints of one folder: the latest ones and the best one are kept.

    Unless `read_only`, it makes the threads of the whole Python process take turns every 0.5 ms.

    Args:
        directory: absolute path; made unless `read_only`.
        keep: how many of the latest to keep, besides the one with the lowest `top1_error`.
        read_only: to look at the checkpoints of a run that may be under way. Without it, unfinished
            saves are taken for leftovers, and removed.
        room: tells at the first save how many bytes of each device are left for a copy of the
            state.

    Raises:
        CheckpointError, StorageError: the folder cannot be used, or cannot be used now.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep: int = 2,
        read_only: bool = False,
        room: Callable[[], float] = room_left,
    ):
        self.directory, self._read_only = directory, read_only
        # Where one process of a run cannot look, all end. One that only reads acts by itself.
        meet = contextlib.nullcontext if read_only else processes.together
        with meet(), _opening(directory):
            if not read_only and processes.is_first():
                commits.remove_others(directory)
            whole = commits.whole(directory)
            commits.check_metrics(directory, whole)
        with _opening(directory):
            self._manager = _Manager(
                directory,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "loop": ocp.JsonCheckpointHandler(),
                },
                options=_options(keep, read_only),
            )
        with meet(), _opening(directory):
            missing = whole - set(self._manager.all_steps())
            if any(commits.is_whole(directory, step) for step in missing):
                raise StorageError(f"{directory} does not show all checkpoints now: try again")
        if not read_only:
            # Orbax's threads are busy with Python for up to a second. Whenever the training loop
            # wants the interpreter, as it often does to start a step, a busy thread keeps it for
            # another 5 ms by default.
            sys.setswitchinterval(min(sys.getswitchinterval(), 5e-4))
        # Even an asynchronous save of Orbax's returns only when all arrays are on the host.
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving, self._copies, self._last = None, None, None
        self._room = room

    def latest_step(self) -> int | None:
        """Number of updates made at the latest checkpoint; None without one."""
        return self._manager.latest_step()

    def best_step(self) -> int:
        """Number of updates made at the checkpoint with the lowest `top1_error`.

        Raises:
            CheckpointError: none was evaluated.
        """
        step = self._manager.best_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.directory} was evaluated")
        return step

    def save(self, step: int, state: PyTree, loop: dict, metrics: dict | None = None) -> None:
        """Starts to save `state` and the JSON-serialisable `loop`.

        A single process copies the state on its devices, and a thread does the rest. Where they
        have no room for the copy, this returns when the state is on the host; so it does with
        several processes, since Orbax synchronises their devices, which no thread may do during a
        training step.

        Args:
            step: number of updates made.
            state: the next step may donate it when this returns.
            loop: what `restore` is to return beside the state.
            metrics: holds `top1_error`, by which the best checkpoint is chosen.

        Raises:
            CheckpointError, StorageError: an earlier save failed, or this one.
            NotFiniteError: a number of that state is NaN or infinite; it is not saved.
        """
        self._finish()
        loop = copy.deepcopy(loop)
        if self._copies is None:
            need = bytes_on_device(state)
            is_alone = jax.process_count() == 1
            self._copies = is_alone and need <= self._room()
            if is_alone and not self._copies:
                print(
                    f"the devices have no room for a copy of the state ({need / 2**20:,.0f} MiB): "
                    "at each checkpoint training waits until the state is on the host",
                    flush=True,
                )
        if self._copies:
            self._saving = self._thread.submit(self._save, step, _copy(state), loop, metrics)
        else:
            self._save(step, state, loop, metrics)

    def _save(self, step: int, state: PyTree, loop: dict, metrics: dict | None) -> None:
        sums, finite = checksums.inspect(state)
        if not finite:
            raise NotFiniteError(
                f"the state is not finite after step {step}, and is not saved: lower config.lr, "
                "with another --workdir"
            )
        if jax.process_count() == 1:
            # For NumPy's arrays Orbax has half as much Python to run, and no programs on devices.
            state = jax.device_get(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            loop=ocp.args.JsonSave(loop | {"checksums": sums}),
        )
        self._wait_until_written()
        self._last = step
        try:
            if not self._manager.save(step, args=items, metrics=metrics):
                raise CheckpointError(f"Orbax refused to save step {step} in {self.directory}")
        except (OSError, ValueError) as error:
            if processes.is_lost_peer(error):
                raise
            raise self._failed(error) from error

    def _finish(self) -> None:
        """Waits for the thread, and raises what the save in it raised, once."""
        if self._saving is not None:
            try:
                self._saving.result()
            finally:
                if self._saving.done():  # else Ctrl-C ended the wait
                    self._saving = None

    def restore(self, like: PyTree) -> tuple[PyTree, dict]:
        """Restores the latest checkpoint onto the devices and shardings of `like`.

        Args:
            like: state of the same shapes and types, arrays or `jax.ShapeDtypeStruct`.

        Returns:
            The state, and what `save` was given as `loop`.

        Raises:
            CheckpointError: it is damaged, or it does not fit `like`.
            StorageError: it cannot be read now.
        """
        return self._read(None, like)

    def restore_weights(self, step: int | None = None) -> tuple[PyTree, PyTree]:
        """Restores the weights of a checkpoint onto one device, whatever else it holds.

        Args:
            step: the checkpoint; the latest one by default.

        Returns:
            The EMA's weights and the raw ones, each {"params", "batch_stats"}.

        Raises:
            CheckpointError, StorageError: as from `restore`.
        """
        state, _ = self._read(step, None)
        raw = {key: state[key] for key in ("params", "batch_stats")}
        # Without a target, Orbax returns the indices of lists as text.
        ema, raw = (nnx.restore_int_paths(weights) for weights in (state["ema"], raw))
        return {"batch_stats": {}} | ema, {"batch_stats": {}} | raw

    def _read(self, step: int | None, like: PyTree | None) -> tuple[PyTree, dict]:
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"there is no checkpoint in {self.directory}")
        if step not in (steps := self._manager.all_steps()):
            steps = ", ".join(map(str, sorted(steps)))
            raise CheckpointError(f"{self.directory} has no checkpoint {step}; it has {steps}")
        try:
            saved = self._manager.item_metadata(step)["state"].tree
            if like is None:
                sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                like = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved
                )
            _check_fit(saved, like)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore()
                ),
            )
            state, loop = restored["state"], restored["loop"]
            sums, _ = checksums.inspect(state)
            if sums != loop.pop("checksums") or by_name(state)["step"] != step:
                raise ValueError("arrays differ from their checksums")
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {self.directory}/{step}: {error}") from error
        except Exception as error:  # damage surfaces as any of a dozen types
            if processes.is_lost_peer(error):
                raise
            reason = first_line(error)
            others = sorted(s for s in self._manager.all_steps() if s != step)
            older = [s for s in others if s < step]
            if self._read_only:
                steps = ", ".join(map(str, others))
                remedy = f"name one of {steps}" if others else "it is the only one"
            elif older:
                remedy = f"delete that folder to go on from step {max(older)}"
            else:
                remedy = "delete that folder to start again"
            what = f"checkpoint {self.directory}/{step}"
            if is_passing(error):
                raise StorageError(f"{what} cannot be read now: try again ({reason})") from error
            is_there = os.path.isdir(os.path.join(self.directory, str(step), "state"))
            if self._read_only and not is_there:
                raise StorageError(f"{what} has just been deleted by its run: try again") from error
            if is_of_this_process(error):
                raise CheckpointError(lacking(what, error)) from error
            raise CheckpointError(f"{what} is damaged: {remedy} ({reason})") from error
        return state, loop

    def close(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            CheckpointError, StorageError, NotFiniteError: as from `save`.
        """
        try:
            self._finish()
            self._wait_until_written()
        except Exception:
            with contextlib.suppress(Exception):  # Orbax reports a failed save twice
                self._end()
            raise
        self._end()  # not after Ctrl-C, which waits for nothing

    def _end(self) -> None:
        self._thread.shutdown()
        self._manager.close()

    def _wait_until_written(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if processes.is_lost_peer(error):
                raise
            is_saved = False
            with contextlib.suppress(OSError):
                is_saved = commits.is_whole(self.directory, self._last)
            if not is_saved:
                raise self._failed(error) from error
            self._manager.reload()  # Orbax has forgotten the new one
            print(
                f"a checkpoint before {self._last} in {self.directory} cannot be deleted, and "
                f"stays: {first_line(error)}",
                flush=True,
            )

    def _failed(self, error: Exception) -> CheckpointError | StorageError:
        # TensorStore's message has long paths before what went wrong, and its settings after it.
        reason = first_line(error).partition(" [tensorstore_spec=")[0][-200:]
        if is_passing(error):
            return StorageError(
                f"saving to {self.directory} failed: the same command goes on from the last "
                f"checkpoint ({reason})"
            )
        free = shutil.disk_usage(os.path.dirname(self.directory)).free / 2**20
        return CheckpointError(
            f"saving to {self.directory} failed, where {free:,.0f} MiB are free: make room or name "
            f"another place, and go on from the last checkpoint ({reason})"
        )


def _options(keep: int, read_only: bool) -> ocp.CheckpointManagerOptions:
    policy = ocp.checkpoint_managers

    def top1_error(metrics):
        return metrics["top1_error"]

    return ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(
            [
                policy.LatestN(keep),
                policy.BestN(
                    get_metric_fn=top1_error,
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        # Without these Orbax does not write the metrics down, and a resumed run would not know
        # which checkpoint is the best.
        best_fn=top1_error,
        best_mode="min",
        create=not read_only,
        multiprocessing_options=_alone() if read_only else ocp.options.MultiprocessingOptions(),
        # A checkpoint is finished by a file. Renaming its folder, as is done on disks, is not
        # atomic in a mounted bucket, where each file is renamed by itself.
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )


def _alone() -> ocp.options.MultiprocessingOptions:
    """For a process that reads by itself: it must not wait for others, which may fail to read."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
    )


@contextlib.contextmanager
def _opening(directory: str):
    try:
        yield
    except OSError as error:
        if processes.is_lost_peer(error):
            raise
        vanished = isinstance(error, FileNotFoundError)  # the run deletes while others read
        kind = StorageError if vanished or is_passing(error) else CheckpointError
        raise kind(f"{directory} cannot be used: {first_line(error)}") from error


def _check_fit(saved: PyTree, like: PyTree) -> None:
    """Orbax casts types and may cut shapes silently, so both are compared first."""
    saved, wanted = (
        {name: (x.shape, np.dtype(x.dtype)) for name, x in by_name(tree).items()}
        for tree in (saved, like)
    )
    wrong = [
        f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"does not fit this configuration in {len(wrong)} arrays, first {wrong[0]}: "
            "use another --workdir"
        )


@jax.jit
def _copy(state: PyTree) -> PyTree:
    """The state in memory of its own, since the next step overwrites it."""
    return jax.tree.map(jnp.copy, state)
