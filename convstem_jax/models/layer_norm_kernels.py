"""Kernels of LayerNorm without gain and bias, for NVIDIA's Hopper GPUs.

The residual stream passes through, so that its gradient is added in the same kernel. XLA's own
kernels take one row at a time, and another one writes the standard deviations between the passes.
"""

import functools

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convstem_jax.models import kernels

_ROWS = 4  # whole rows of a program: one for each warp


def fits(x: jax.Array) -> bool:
    """Whether `normalize` is to be used for `x`: wider rows would not fit in the registers."""
    return kernels.are_used(x) and x.shape[-1] <= 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """`x` itself, and `x` minus its mean, divided by its standard deviation, over the last axis.

    Args:
        x: `[N, T, C]`.
        epsilon: added to the variance.
    """
    return x, kernels.by_device(functools.partial(_values, epsilon))(x)


def _backward(epsilon, x, grads):
    return (kernels.by_device(functools.partial(_gradient, epsilon))((x, *grads)),)


normalize.defvjp(lambda x, epsilon: (normalize(x, epsilon), x), _backward)


def _values(epsilon, x):
    def kernel(exists, num_columns, x_ref, y_ref):
        y, _ = _normalized(kernels.load(x_ref, exists), num_columns, epsilon)
        kernels.store(y_ref, y, exists)

    return _call(kernel, [x], "layer_norm")


def _gradient(epsilon, x_and_grads):
    def kernel(exists, num_columns, x_ref, grad_x_ref, grad_y_ref, out_ref):
        x, grad_x, grad_y = (
            kernels.load(ref, exists).astype(jnp.float32) for ref in (x_ref, grad_x_ref, grad_y_ref)
        )
        y, inv_std = _normalized(x, num_columns, epsilon)
        shift = grad_y.sum(1, keepdims=True) / num_columns
        slope = (grad_y * y).sum(1, keepdims=True) / num_columns
        kernels.store(out_ref, grad_x + inv_std * (grad_y - shift - slope * y), exists)

    return _call(kernel, x_and_grads, "layer_norm_gradient")


def _normalized(x, num_columns, epsilon):
    """Normalised rows, whose last columns may not exist, and their inverse standard deviations."""
    x = x.astype(jnp.float32)
    x -= x.sum(1, keepdims=True) / num_columns
    x = jnp.where(jnp.arange(x.shape[1]) < num_columns, x, 0)
    inv_std = jax.lax.rsqrt((x * x).sum(1, keepdims=True) / num_columns + epsilon)
    return x * inv_std, inv_std


def _call(kernel, inputs, name):
    """Runs `kernel` on arrays of one shape; returns another of that shape."""
    shape = inputs[0].shape
    inputs = [x.reshape(-1, shape[-1]) for x in inputs]
    num_rows, num_columns = inputs[0].shape

    def on_block(*refs):
        rows = pl.program_id(0) * _ROWS + jnp.arange(_ROWS) < num_rows
        columns = jnp.arange(refs[0].shape[1]) < num_columns
        kernel(rows[:, None] & columns, num_columns, *refs)

    block = pl.BlockSpec((_ROWS, pl.next_power_of_2(num_columns)), lambda i: (i, 0))
    call = kernels.call(
        on_block,
        name=name,
        grid=(pl.cdiv(num_rows, _ROWS),),
        in_specs=[block] * len(inputs),
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), inputs[0].dtype),
        num_warps=_ROWS,
    )
    return call(*inputs).reshape(shape)
