"""Several processes, on one machine or on many, that train one model."""

import contextlib
import hashlib
import os
import re
import socket
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from convstem_jax.errors import (
    ConfigError,
    PeerError,
    StorageError,
    UnreachableError,
    UserError,
    causes,
    first_line,
    is_passing,
)

REACH_SECONDS = 240  # for process 0 to answer, less than JAX waits
MEET_SECONDS = 10  # for the others to reach the end


def start(coordinator: str | None, num_processes: int | None, process: int | None) -> None:
    """Joins the other processes of the run, before anything else of JAX is used.

    Without arguments JAX finds them where it can: on Cloud TPU (also in GKE), under SLURM and under
    Open MPI. Elsewhere this process is alone.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: of the run; 1 without the other arguments looks for no others.
        process: number of this one.

    Raises:
        ConfigError: part of the arguments is missing or wrong, or the others cannot be joined.
        UnreachableError: process 0 does not answer within minutes.
    """
    given = [coordinator, num_processes, process]
    if None not in (num_processes, process) and not 0 <= process < num_processes:
        raise ConfigError(f"--process {process} must be from 0 to {num_processes - 1}")
    if num_processes == 1 and coordinator is None:
        return
    if any(value is None for value in given) and any(value is not None for value in given):
        raise ConfigError("--coordinator, --processes and --process belong together: give all")
    port = re.fullmatch(r".+:(\d+)", coordinator or "none:0")
    if not port or int(port[1]) >= 2**16:
        raise ConfigError(f"--coordinator {coordinator} must be HOST:PORT, as in 10.0.0.1:8476")
    slurm = os.environ if "SLURM_STEP_NODELIST" in os.environ else {}
    is_alone = slurm.get("SLURM_NTASKS") == "1" and "OMPI_COMM_WORLD_SIZE" not in os.environ
    if coordinator is None and is_alone:
        return  # JAX would leave it only the first of its GPUs
    if coordinator is not None:  # it may take minutes to find that nobody is there
        print(f"meeting the other processes at {coordinator}", file=sys.stderr, flush=True)
        if process:
            _wait_for(coordinator)
    elif slurm.get("SLURM_PROCID") == "0":
        print(
            f"meeting the other processes, {slurm.get('SLURM_NTASKS')} in all as SLURM says; "
            "--processes=1 looks for no others",
            file=sys.stderr,
            flush=True,
        )
    try:
        # Otherwise JAX would still look for a cluster, and use one device of this machine.
        method = None if coordinator is None else "deactivate"
        jax.distributed.initialize(*given, cluster_detection_method=method)
    except ValueError as error:
        # What JAX says where it finds no cluster.
        if coordinator is None and "should be defined" in str(error):
            return
        raise ConfigError(f"--coordinator {coordinator}: {first_line(error)}") from error
    except RuntimeError as error:
        # In a notebook that has used JAX already.
        if coordinator is None and "must be called before" in str(error):
            return
        raise ConfigError(
            f"the other processes cannot be reached ({first_line(error)}): check that all run and "
            "that --coordinator names process 0; --processes=1 looks for no others"
        ) from error


def _wait_for(coordinator: str) -> None:
    """Waits until process 0 answers: JAX aborts a process that gets no answer from it.

    Raises:
        UnreachableError: it does not.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + REACH_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"nothing answers at --coordinator {coordinator} ({first_line(error)}): check "
                    "that process 0 runs there and that no firewall is in between"
                ) from error
        time.sleep(1)


def is_first() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def leave(exit_status: int) -> None:
    """Ends this process of several.

    It waits for the others, to end together where they stop for the same reason; but not long,
    since where they are lost or wait for this one they could wait for each other for minutes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    meet = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    meet.start()
    meet.join(1)
    if meet.is_alive():
        print(f"waiting up to {MEET_SECONDS} s for the other processes", file=sys.stderr)
        meet.join(MEET_SECONDS)
    os._exit(exit_status)


def print_once(text: str) -> None:
    """Prints a line of the run, not of each process."""
    if is_first():
        print(text, flush=True)


@contextlib.contextmanager
def together():
    """A context for checks that every process makes: an error in one ends all, with its status.

    Without it the others would wait for the one that stopped.
    """
    error = None
    try:
        yield
    except Exception as own:  # unexpected ones too
        if is_lost_peer(own):
            raise
        error = own
    status = error.status if isinstance(error, UserError) else 1
    status = StorageError.status if is_passing(error) else status
    try:
        statuses = gather([status if error else 0])[:, 0]
    finally:
        if error is not None:  # also where another process is lost meanwhile
            raise error
    if statuses.any():
        raise PeerError(int(np.flatnonzero(statuses)[0]), int(statuses[statuses > 0][0]))


def check_same(text: str, message: str) -> None:
    """Checks that `text` is the same in every process; not inside `together`, which gathers too.

    Raises:
        ConfigError: it is not; `message`, after a process's number, says what is wrong and to do.
    """
    digests = gather([int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])])[:, 0]
    if different := np.flatnonzero(digests != digests[0]).tolist():
        raise ConfigError(f"process {different[0]} {message}")


# What the transports and the service that watches the processes say.
_LOST = re.compile(
    r"UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|gloo|nccl|barrier|heartbeat|by peer|"
    r"preempted|halted unexpectedly|unhealthy",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of JAX's or Orbax's means that another process of the run is gone.

    It comes as a RuntimeError or a ValueError, depending on what notices first, or as the
    TimeoutError that Orbax makes of one.
    """
    if not (jax.distributed.is_initialized() and jax.process_count() > 1):
        return False
    kinds = RuntimeError | ValueError | TimeoutError
    return any(isinstance(c, kinds) and bool(_LOST.search(str(c))) for c in causes(error))


def gather(numbers: list[int]) -> np.ndarray:
    """32-bit numbers of every process, `[processes, numbers]`."""
    own = np.array([numbers], np.uint32)
    return own if jax.process_count() == 1 else multihost_utils.process_allgather(own[0])
