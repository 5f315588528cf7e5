"""Where arrays lie: the batch is split over all devices, the state lies on each or is split too."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import math

import jax
import numpy as np

from convstem_jax.step import PyTree
from convstem_jax.xla_options import compiler_options

STATES = ("replicated", "fsdp")
# Smaller arrays are not split: they take little memory, and each collective costs its latency.
MIN_SIZE = 2**13


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The sharding of a run's arrays.

    Args:
        devices: of all processes.
        state: "replicated", or "fsdp": parameters, optimiser and EMA are split over the devices.
    """

    devices: Sequence[jax.Device]
    state: str = "replicated"

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """All devices along the axis `data`, those of one process next to each other.

        This makes the rows of a batch that a process reads contiguous.
        """
        devices = sorted(self.devices, key=lambda d: (d.process_index, d.id))
        auto = (jax.sharding.AxisType.Auto,)
        return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=auto)

    @property
    def replicated(self) -> jax.NamedSharding:
        """The whole array on every device."""
        return jax.NamedSharding(self.mesh, jax.P())

    @property
    def batch(self) -> jax.NamedSharding:
        """An equal part of the rows on every device."""
        return jax.NamedSharding(self.mesh, jax.P("data"))

    def of_state(self, state: PyTree) -> PyTree:
        """Sharding of each array of a state, or of a part of one.

        One rule for "fsdp": an array of at least `MIN_SIZE` numbers is split along its longest axis
        that is divisible by the devices; one without such an axis lies on every device.
        """
        return jax.tree.map(self._of_array, state)

    def _of_array(self, x) -> jax.NamedSharding:
        divisible = [n for n in x.shape if n % len(self.devices) == 0]
        if self.state == "replicated" or math.prod(x.shape) < MIN_SIZE or not divisible:
            return self.replicated
        axis = x.shape.index(max(divisible))
        return jax.NamedSharding(self.mesh, jax.P(*[None] * axis, "data"))

    def jit(self, function: Callable, *static, **options) -> Callable:
        """`jax.jit` of `function` with its first arguments bound, on these devices.

        `options` are those of `jax.jit`; `compiler_options` default to those of `xla_options`.
        """
        options.setdefault("compiler_options", compiler_options(self.devices))

        def on_mesh(*args):
            # The models choose their forms by the mesh's devices.
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return function(*static, *args)

        on_mesh.__name__ = function.__name__  # what profiles show
        return jax.jit(on_mesh, **options)


def without_mesh() -> contextlib.AbstractContextManager:
    """A context without the mesh that a caller may have set, which other devices would not fit."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def bytes_on_device(tree: PyTree) -> int:
    """Bytes that arrays, or shapes with a sharding, take on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def room_left() -> float:
    """Bytes that were free on the fullest device at the highest use so far."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]  # CPUs have none
    return min(x.get("bytes_limit", math.inf) - x.get("peak_bytes_in_use", 0) for x in stats)


def bytes_of_program(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program takes on each device with its arguments and results, not its code."""
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + outputs + found.temp_size_in_bytes
