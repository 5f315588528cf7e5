"""What this project's own kernels for GPUs share: they are written in Pallas, for Triton."""

from collections.abc import Sequence
import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convstem_jax.models.target import by_device, on_hopper

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX announces its end. What XLA and cuDNN have takes their place then.
    triton = None


def are_used(dtype: jnp.dtype) -> bool:
    """Whether they are to be used: for 16 bits, on the GPUs that they were measured on.

    Where a mesh has explicit axes, XLA cannot divide them.
    """
    has_explicit_axes = bool(jax.sharding.get_abstract_mesh().explicit_axes)
    is_here = dtype == jnp.bfloat16 and on_hopper() and triton is not None
    return is_here and not has_explicit_axes


# Each device's part of a batch; what a kernel returns does not say along which axes it differs.
by_device = functools.partial(by_device, check_vma=False)


def call(
    kernel: functools.partial,
    inputs: Sequence[jax.Array],
    in_specs: Sequence[pl.BlockSpec],
    outputs: Sequence[tuple[tuple[int, ...], jnp.dtype]],
    out_specs: Sequence[pl.BlockSpec],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int = 1,
) -> list[jax.Array]:
    """`pallas_call` with `num_warps` warps to a program; on CPUs interpreted, for tests.

    Args:
        kernel: takes references to the blocks of inputs and outputs.
        inputs: arrays.
        in_specs: their blocks.
        outputs: shapes and types.
        out_specs: their blocks.
        grid: how many programs.
        num_warps: of a program.
        num_stages: how many rounds of a loop are under way at once, for their loads.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
        out_specs=out_specs,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=jax.default_backend() == "cpu",
    )(*inputs)


def load(ref, exists: jax.Array) -> jax.Array:
    """What exists, and zeros elsewhere.

    Args:
        ref: of a block.
        exists: bool, to be broadcast to it.
    """
    return triton.load(ref, mask=exists, other=0.0)


def store(ref, x: jax.Array, exists: jax.Array) -> None:
    """Writes what exists, likewise, in the type of `ref`."""
    triton.store(ref, x.astype(ref.dtype), mask=exists)
