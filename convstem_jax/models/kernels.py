"""What this project's own kernels for GPUs share: they are written in Pallas, for Triton."""

from collections.abc import Callable
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convstem_jax.models import target

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX announces its removal. XLA and cuDNN take their place then.
    triton = None

INTERPRET = False  # for tests where there is no GPU


def are_used(x: jax.Array) -> bool:
    """Whether the kernels are to be used for an array like `x`, whose first axis is the batch.

    They are for 16-bit types and one generation of GPUs. XLA cannot partition them: `by_device`
    must, and does it along the axis `data`, if there is one. They index a device's array with 32
    bits: the largest array, of queries, keys and values, has three times the numbers of `x`.
    """
    if x.dtype != jnp.bfloat16 or not target.on_hopper() or triton is None:
        return False
    if not isinstance(x.shape[0], int):  # `jax.export` with any number of images
        return False
    mesh = jax.sharding.get_abstract_mesh()
    is_divided = set(mesh.axis_names) == set(mesh.auto_axes) <= {"data"}
    num_devices = max(1, target.num_devices())
    return is_divided and len(x) % num_devices == 0 and 3 * x.size // num_devices < 2**31


# What a kernel returns does not say along which mesh axes it differs, which JAX would check.
by_device = functools.partial(target.by_device, check_vma=False)


def call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int = 1, **options
) -> Callable:
    """`pl.pallas_call` for Triton.

    Args:
        kernel: takes references to the blocks of inputs and outputs.
        num_warps: of a program.
        num_stages: how many iterations of a loop are under way at once, to overlap their loads.
        **options: of `pl.pallas_call`.
    """
    params = triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(kernel, compiler_params=params, interpret=INTERPRET, **options)


def load(ref, exists: jax.Array) -> jax.Array:
    """Reads a block: what exists of it, and zeros elsewhere.

    Args:
        ref: reference to the block.
        exists: bool, to be broadcast to the block.
    """
    return triton.load(ref, mask=exists, other=0.0)


def store(ref, x: jax.Array, exists: jax.Array) -> None:
    """Writes what exists of a block, in the type of `ref`."""
    triton.store(ref, x.astype(ref.dtype), mask=exists)
