"""Runs several processes of `main` on this machine, as a cluster would on many.

    python -m convstem_jax.launch_local --processes 4 --devices_per_process 2 -- \\
        --config configs/quickstart.py --workdir runs/several

The lines of process 0 are printed as they are, those of the others after their number. The exit
status is that of `main`. Where processes end differently, an error that you have to fix comes
before 75, which says that a process was lost: then give the same command again.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from convstem_jax.terminal import new_parser, outlive_readers, positive

GRACE_SECONDS = 60  # for the others to end by themselves, once one has failed


def launch(command: list[str], *, num_processes: int, devices_per_process: int | None) -> int:
    """Runs `command` in several processes that know each other; returns their exit status.

    Args:
        command: a program that takes --coordinator, --processes and --process.
        num_processes: of the run.
        devices_per_process: virtual CPU devices for each; None for what the machine has.
    """
    env = dict(os.environ)
    if devices_per_process:
        # Devices wait for each other inside a collective, and each needs a thread of XLA's then.
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices_per_process),
            "NPROC": str(4 + 4 * devices_per_process),
        }
    cluster = ["--coordinator", free_address(), "--processes", str(num_processes)]
    started = [
        subprocess.Popen(
            [*command, *cluster, "--process", str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches each once, from here
        )
        for i in range(num_processes)
    ]

    def forward(signum, unused_frame):
        if signum == signal.SIGHUP:  # the terminal is closed: they should save
            signum = signal.SIGTERM
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, forward)
    readers = [
        threading.Thread(target=_copy_lines, args=(process, f"[{i}] " if i else ""))
        for i, process in enumerate(started)
    ]
    for reader in readers:
        reader.start()
    _wait(started)
    for reader in readers:
        reader.join()
    statuses = [process.returncode for process in started]
    for i, status in enumerate(statuses):
        if status < 0:
            print(f"process {i} was ended by signal {-status}", file=sys.stderr)
    return exit_status(statuses)


def free_address() -> str:
    """An address of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def _copy_lines(process: subprocess.Popen, prefix: str) -> None:
    for line in process.stdout:
        print(f"{prefix}{line}", end="", flush=True)


def _wait(started: list[subprocess.Popen]) -> None:
    """Waits for all of them, but after a failure not for ever."""
    deadline = float("inf")
    while any(process.poll() is None for process in started):
        if deadline == float("inf") and any(process.returncode for process in started):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.1)


def exit_status(statuses: list[int]) -> int:
    """The status of a run from those of its processes, negative where a signal ended one."""
    interrupted = 130
    statuses = [interrupted if status == -signal.SIGINT else status for status in statuses]
    # If a person interrupted one process, the others only report that they lost it.
    for wanted in (2, 3, 4, 5, 1, interrupted):
        if wanted in statuses:
            return wanted
    if 75 in statuses or any(status < 0 for status in statuses):
        return 75
    return max(statuses)


@outlive_readers()
def main(argv: list[str]) -> int:
    """Reads the command line; returns the exit status of the run."""
    parser = new_parser(
        "convstem_jax.launch_local",
        __doc__,
        usage="%(prog)s [-h] --processes N [--devices_per_process N] -- FLAGS OF MAIN",
    )
    parser.add_argument("--processes", type=positive, required=True, metavar="N")
    parser.add_argument(
        "--devices_per_process", type=positive, metavar="N",
        help="virtual CPU devices for each; without it each takes all devices of this machine, "
        "which GPUs and TPUs allow only one process to do",
    )  # fmt: skip
    parser.add_argument("flags", nargs="+", help="flags of convstem_jax.main, after --")
    args = parser.parse_args(argv)
    return launch(
        [sys.executable, "-m", "convstem_jax.main", *args.flags],
        num_processes=args.processes,
        devices_per_process=args.devices_per_process,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
