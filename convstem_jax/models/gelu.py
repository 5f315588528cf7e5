"""The exact (erf) GELU after a bias, and kernels for it on NVIDIA's Hopper GPUs.

XLA's own kernels take GPUs nearly twice as long as their memory needs: they multiply and add apart,
and where the bias's gradient is summed they read two bytes at a time.
"""

import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convstem_jax.models import kernels
from convstem_jax.models.attention import in_order
from convstem_jax.models.target import on_gpu

_ROWS, _COLUMNS = 64, 64  # that a program of the kernels has at once
_NUM_PARTS = 8  # below each other, for a program of the gradient's


def gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`gelu(x + bias)`, computed in float32; its gradient is computed from the sum anew.

    Args:
        x: `[N, T, C]`.
        bias: `[C]`, of the same type.
    """
    if kernels.are_used(x.dtype) and x.shape[-1] % _COLUMNS == 0:
        return _by_kernel(x, bias)
    # `reshape` as in nnx.Linear, so that programs for TPUs stay those that were estimated.
    return _gelu(in_order(x + bias.reshape(1, 1, -1)))


@jax.custom_vjp
def _gelu(x):
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    y = x.astype(jnp.float32)
    cdf, exponential = _cdf_and_exponential(y)
    slope = cdf + y * exponential / math.sqrt(2 * math.pi)
    return (y * cdf).astype(x.dtype), slope.astype(x.dtype)


def _cdf_and_exponential(y):
    """Of the normal distribution, and `exp(-y**2 / 2)`."""
    if not on_gpu():
        return 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))), jnp.exp(-0.5 * y**2)
    # Abramowitz and Stegun's 7.1.26, as near as float32: less arithmetic than erf and an
    # exponential. To base 2 it is one instruction.
    exponential = jnp.exp2(-0.5 * math.log2(math.e) * y**2)
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(y))
    polynomial = 0.0
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + 0.5 * a) * t
    tail = polynomial * exponential
    return jnp.where(y < 0, tail, 1 - tail), exponential


def _backward(x, grad):
    if on_gpu():  # Else XLA would keep the forward pass's float32 numbers to save their arithmetic.
        x = jax.lax.optimization_barrier(x)
    return (grad * _gelu_and_slope(x)[1],)


_gelu.defvjp(lambda x: (_gelu(x), x), _backward)


@jax.custom_vjp
def _by_kernel(x, bias):
    return _forward(x, bias)[0]


def _forward(x, bias):
    x += bias
    return kernels.by_device(_values)(x), x


def _backward_by_kernel(x, grad):
    grad, sums = kernels.by_device(_gradients)((x, grad))
    return grad, sums.sum(0).astype(x.dtype)


_by_kernel.defvjp(_forward, _backward_by_kernel)


def _values(x):
    def kernel(x_ref, y_ref):
        exists = pl.program_id(0) * _ROWS + jnp.arange(_ROWS) < len(rows)
        kernels.store(y_ref, _gelu_and_slope(kernels.load(x_ref, exists))[0], exists)

    rows = x.reshape(-1, x.shape[-1])
    block = pl.BlockSpec((_ROWS, _COLUMNS), lambda i, j: (i, j))
    grid = pl.cdiv(len(rows), _ROWS), rows.shape[1] // _COLUMNS
    (y,) = kernels.call(
        kernel, [rows], [block], [(rows.shape, x.dtype)], [block], grid=grid, num_warps=4
    )
    return y.reshape(x.shape)


def _gradients(x_and_grad):
    """Of `x`, and of the bias for each program's rows, in float32."""

    def kernel(x_ref, grad_ref, grad_x_ref, sums_ref):
        first = pl.program_id(0) * num_rows

        def add(i, total):
            part = pl.ds(i * _ROWS, _ROWS)
            exists = first + i * _ROWS + jnp.arange(_ROWS) < len(x)
            slope = _gelu_and_slope(kernels.load(x_ref.at[part], exists))[1]
            grad_x = kernels.load(grad_ref.at[part], exists) * slope
            kernels.store(grad_x_ref.at[part], grad_x, exists)
            return total + grad_x.astype(jnp.float32)

        zeros = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
        sums_ref[...] = jax.lax.fori_loop(0, _NUM_PARTS, add, zeros).sum(0)

    shape, num_rows = x_and_grad[0].shape, _ROWS * _NUM_PARTS
    x, grad = (y.reshape(-1, shape[-1]) for y in x_and_grad)
    block = pl.BlockSpec((num_rows, _COLUMNS), lambda i, j: (i, j))
    sums = pl.BlockSpec((None, _COLUMNS), lambda i, j: (i, j))
    grid = pl.cdiv(len(x), num_rows), shape[-1] // _COLUMNS
    outputs = (x.shape, x.dtype), ((grid[0], shape[-1]), jnp.float32)
    grad_x, sums = kernels.call(
        kernel, [x, grad], [block] * 2, outputs, [block, sums], grid=grid, num_warps=4, num_stages=2
    )
    return grad_x.reshape(shape), sums
