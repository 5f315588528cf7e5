"""TPU slices that need not be there: their chips, and what the TPU compiler says about a program.

The compiler is in the package `libtpu` (requirements-tpu.txt) and runs on any x86 Linux machine.
"""

import dataclasses
import hashlib
import importlib.util
import math
import os
import re
import time

import jax
from jax.experimental import topologies

from convstem_jax import provenance
from convstem_jax.errors import ConfigError, first_line
from convstem_jax.hlo import read_program
from convstem_jax.sharding import bytes_of_program


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as published (cloud.google.com/tpu/docs/system-architecture-tpu-vm).

    Clocks follow from the flops and the size of the matrix units.
    """

    flops: float  # bfloat16 operations a second
    clock: float  # cycles a second
    # Bytes a second through one link, one way, as jax-ml.github.io/scaling-book has it; v3's is the
    # 656 Gbit/s of Jouppi et al., A domain-specific supercomputer for training deep networks, 2020.
    link: float
    axes: int  # of the torus
    ring: int  # an axis of the torus closes to a ring where its chips are a multiple of this
    config: str = "default"  # "megacore": the two cores of a chip are one device


CHIPS = {
    "v3": Chip(123e12, 0.94e9, 82e9, 2, 32),
    "v4": Chip(275e12, 1.05e9, 45e9, 3, 4, "megacore"),
    "v5e": Chip(197e12, 1.5e9, 45e9, 2, 16),
    "v5p": Chip(459e12, 1.75e9, 90e9, 3, 4, "megacore"),
    "v6e": Chip(918e12, 1.75e9, 90e9, 2, 16),
}


FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # of the environment, which the compiler reads


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices of a slice, which can be compiled for but not computed on."""

    name: str
    chip: Chip
    devices: list
    num_chips: int
    num_hosts: int


def open_slice(name: str) -> Slice:
    """Makes the slice `v5e:16x16`: a generation and its chips along each axis of the torus.

    Raises:
        ConfigError: there is no such slice, or libtpu is not installed.
    """
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud what this machine is
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here owns a chip
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    generation, _, shape = name.partition(":")
    known = generation in CHIPS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape)
    if not known or shape.count("x") + 1 != CHIPS[generation].axes:
        raise ConfigError(
            f"--topology {name} is not one of {', '.join(CHIPS)}, a colon and its chips along each "
            "axis, three for v4 and v5p and two for the others: v5litepod-256 is v5e:16x16, v4-32 "
            "is v4:2x2x4, v5p-128 is v5p:4x4x4"
        )
    if not importlib.util.find_spec("libtpu"):
        raise ConfigError(
            "the TPU compiler is not installed: pip install --require-hashes -r requirements.lock "
            "-r requirements-tpu.lock, on an x86 Linux machine"
        )
    chip, sizes = CHIPS[generation], [int(size) for size in shape.split("x")]
    options = {"chip_config_name": chip.config}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except Exception as error:
        raise ConfigError(f"--topology {name}: {first_line(error)}") from error
    hosts = {device.process_index for device in devices}
    return Slice(name, chip, list(devices), math.prod(sizes), len(hosts))


def compile_step(traced: jax.stages.Traced, slice_: Slice, quick: bool, known: dict | None) -> dict:
    """What the compiler says about a traced program on one device.

    Args:
        traced: the program, its arguments sharded over the slice.
        slice_: what to compile for.
        quick: with the least effort.
        known: an earlier answer, returned again if program, versions and flags are the same.

    Returns:
        A JSON-serialisable dict; `bytes` is None where the memory is too small.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason.
    """
    lowered = traced.lower()
    program = {
        "sha256": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "quick": quick,
        "versions": provenance.versions(),
        "flags": {name: os.environ[name] for name in FLAGS if os.environ.get(name)},
    }
    if known and program.items() <= known.items():
        return known
    said = program | dict.fromkeys(
        ("bytes", "code_bytes", "temporaries_needed", "flops", "cycles", "collectives")
    )
    start = time.perf_counter()
    try:
        effort = {"optimization_level": 9} if quick else None  # JAX calls it O0
        compiled = lowered.compile(compiler_options=effort)
    except jax.errors.JaxRuntimeError as error:
        memory = out_of_memory(error)
        if memory is None:
            raise
        said["temporaries_needed"] = memory[0]
    else:
        said["code_bytes"] = compiled.memory_analysis().generated_code_size_in_bytes
        said["bytes"] = bytes_of_program(compiled) + said["code_bytes"]
        said["flops"] = round(compiled.cost_analysis()["flops"])
        said |= dataclasses.asdict(read_program(compiled.as_text()))
        if not quick and not said["cycles"]:
            raise ValueError("the compiler estimates no cycles any more: libtpu is too new")
    said["seconds"] = round(time.perf_counter() - start, 1)
    return said | {"device_bytes": device_bytes(slice_)}


def device_bytes(slice_: Slice) -> int:
    """Memory of a device according to the compiler: from its error for a program too large."""
    sharding = jax.sharding.SingleDeviceSharding(slice_.devices[0])
    x = jax.ShapeDtypeStruct((2**42,), "uint8", sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        if memory := out_of_memory(error):
            return memory[1]
        raise
    raise AssertionError("a program of 8 TiB fits")


def out_of_memory(error: Exception) -> tuple[int, int] | None:
    """The bytes that a device would need and those that it has; None for any other error."""
    text, size = str(error), r"([\d.]+)([KMGT]?)"
    for pattern in (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if match := re.search(pattern, text):
            need, unit, has, other = match.groups()
            return _bytes(need, unit), _bytes(has, other)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 2 ** (10 * " KMGT".index(unit or " ")))


def collective_seconds(slice_: Slice, collectives: dict[str, tuple[int, int]]) -> float:
    """Time of the collectives at the links' published speed, nothing hidden behind computation.

    On a ring of n devices each link carries (n - 1) / n of a gathered array, and twice that of a
    reduced one; the axes of the torus share it. A chip has two links along an axis that closes to a
    ring, and one to send along any other.
    """
    n, total = len(slice_.devices), 0.0
    sizes = [int(size) for size in slice_.name.split(":")[1].split("x")]
    closed = [size % slice_.chip.ring == 0 for size in sizes]
    if len(sizes) == 3:  # they close only in slices of whole cubes
        closed = [all(closed)] * 3
    links = sum(1 + ring for size, ring in zip(sizes, closed, strict=True) if size > 1)
    speed = slice_.chip.link * max(1, links)
    for kind, (_, size) in collectives.items():
        factor = {"all-reduce": 2, "reduce-scatter": n}.get(kind, 1)
        total += factor * size * (n - 1) / n / speed
    return total
