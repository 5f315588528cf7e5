"""What made a result: the device, the versions, the commit."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess

import jax


def device() -> str:
    """The number and kind of the devices, and the processor where they are CPUs."""
    devices = jax.devices()
    about = f" ({processor()})" if devices[0].platform == "cpu" else ""
    return f"{len(devices)} x {devices[0].device_kind}{about}"


def processor() -> str:
    """What Linux calls the CPU, and the number of cores that this process may use."""
    with open("/proc/cpuinfo") as file:
        names = [line for line in file if line.startswith("model name")]  # none on ARM
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the study needs few
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str | None:
    """Commit of the code that runs, with "-dirty" where files differ from it; None if unknown.

    Outside git it is what $CONVSTEM_COMMIT says, as launch/Dockerfile sets it.
    """

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments],
            cwd=os.path.dirname(__file__),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        # The package may be installed in a folder of another project.
        git("ls-files", "--error-unmatch", os.path.basename(__file__))
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CONVSTEM_COMMIT") or None
