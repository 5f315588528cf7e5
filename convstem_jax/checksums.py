"""Checksums of a training state, and whether all its numbers are finite."""

import jax
import jax.numpy as jnp
import numpy as np

from convstem_jax import processes
from convstem_jax.step import PyTree, by_name

# Programs that wait on a CPU device while a state is inspected. A device queues 32 at most: where
# a thread fills the queue and another begins a step on several devices, both wait for ever (JAX
# 0.10, 0.11).
MAX_WAITING = 8


def inspect(state: PyTree) -> tuple[dict[str, int], bool]:
    """A checksum of each array, by name, and whether all numbers are finite."""
    # Each device sums up what it holds, but copies count once. One program for each shape compiles
    # ten times faster than one for all the arrays.
    arrays = by_name(state)
    wanted, found = list(arrays.values()), []
    at_once = MAX_WAITING if jax.default_backend() == "cpu" else len(wanted)
    while wanted:
        found += jax.device_get(
            [
                [_sum_words(part.data) for part in x.addressable_shards if not part.replica_id]
                for x in wanted[:at_once]
            ]
        )
        del wanted[:at_once]
    own = [sum(int(total) for total, _ in parts) % 2**32 for parts in found]
    broken = sum(not finite for parts in found for _, finite in parts)
    if not all(x.is_fully_addressable for x in arrays.values()):
        *own, broken = processes.gather([*own, broken]).sum(axis=0, dtype=np.uint32).tolist()
    return dict(zip(arrays, own, strict=True)), not broken


@jax.jit
def _sum_words(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the 32-bit words modulo 2^32, and whether all numbers are finite."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.sum(words, dtype=jnp.uint32), jnp.isfinite(x).all()
