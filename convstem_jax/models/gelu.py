"""The exact (erf) GELU, and a kernel for it on NVIDIA's Hopper GPUs."""

import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convstem_jax.models import kernels
from convstem_jax.models.target import on_gpu

_BLOCK = 4096  # numbers that a program of the kernel computes


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU of `[N, ...]`, computed in float32; the gradient recomputes all from `x`."""
    if kernels.are_used(x):
        return kernels.by_device(_by_kernel)(x)
    return _gelu_and_slope(x)[0]


def _backward(x, grad):
    if on_gpu():  # Else XLA would keep the forward pass's float32 numbers to save arithmetic.
        x = jax.lax.optimization_barrier(x)
    return (grad * _gelu_and_slope(x)[1],)


gelu.defvjp(lambda x: (gelu(x), x), _backward)


def _gelu_and_slope(x):
    y = x.astype(jnp.float32)
    cdf, exponential = _cdf_and_exponential(y)
    slope = cdf + y * exponential / math.sqrt(2 * math.pi)
    return (y * cdf).astype(x.dtype), slope.astype(x.dtype)


def _cdf_and_exponential(y):
    """The normal distribution's CDF at `y`, and `exp(-y**2 / 2)`."""
    if not on_gpu():
        return 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))), jnp.exp(-0.5 * y**2)
    # Abramowitz and Stegun's 7.1.26, as accurate as float32: less arithmetic than erf and an
    # exponential. An exponential to base 2 is one instruction.
    exponential = jnp.exp2(-0.5 * math.log2(math.e) * y**2)
    t = 1 / (1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(y))
    polynomial = 0.0
    for a in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        polynomial = (polynomial + 0.5 * a) * t
    tail = polynomial * exponential
    return jnp.where(y < 0, tail, 1 - tail), exponential


def _by_kernel(x):
    """`gelu` by a kernel. XLA's has 8 bytes in flight per thread, which are too few."""

    def kernel(x_ref, y_ref):
        exists = pl.program_id(0) * _BLOCK + jnp.arange(_BLOCK) < x.size
        kernels.store(y_ref, _gelu_and_slope(kernels.load(x_ref, exists))[0], exists)

    block = pl.BlockSpec((_BLOCK,), lambda i: (i,))
    call = kernels.call(
        kernel,
        name="gelu",
        grid=(pl.cdiv(x.size, _BLOCK),),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        num_warps=4,
    )
    return call(x.reshape(-1)).reshape(x.shape)
