"""BatchNorm and LayerNorm, and how they are computed together with what follows them."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from convstem_jax.models import layer_norm_kernels
from convstem_jax.models.target import on_cpu, on_gpu


def batch_norm(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """BatchNorm as the authors have it. Flax's momentum 0.9 is torch's 0.1.

    Differs from the paper: the statistics are over the global batch, and the running variance is
    the biased one.
    """
    return nnx.BatchNorm(
        width, momentum=0.9, epsilon=1e-5, dtype=dtype, promote_dtype=_at_least_float32, rngs=rngs
    )


def layer_norm(width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the channels, as in the blocks of the transformer."""
    return nnx.LayerNorm(
        width, epsilon=1e-6, dtype=dtype, promote_dtype=_at_least_float32, rngs=rngs
    )


def _at_least_float32(arrays, dtype):
    """Norms compute in float32 or more and round their result to `dtype` once.

    In bfloat16 the gradients of gain and bias would be sums of bfloat16 numbers, which TPUs do not
    fuse with the products beside them.
    """
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), arrays)


def before_linear(
    norm: nnx.LayerNorm, linear: nnx.Linear, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Splits `linear(norm(x))` before the product, which is `y @ kernel + bias`.

    On GPUs the norm's gain and bias become part of the layer's kernel and bias. Their gradients are
    then sums over the layer's gradients, which are small, and of four passes over the tokens and
    their gradients two are left: one kernel for the normalisation and one for its gradient.

    Args:
        norm: over the channels.
        linear: with a bias.
        x: `[..., C]`.

    Returns:
        x, for what else reads it, so that one kernel can sum the gradients; y in the type of `x`;
        kernel and bias in their own types.
    """
    kernel, bias = linear.kernel[...], linear.bias[...]
    if not on_gpu():
        return x, norm(x), kernel, bias
    if layer_norm_kernels.fits(x):
        x, y = layer_norm_kernels.normalize(x, norm.epsilon)
    else:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y -= y.mean(axis=-1, keepdims=True)
        y *= jax.lax.rsqrt((y**2).mean(axis=-1, keepdims=True) + norm.epsilon)
        y = y.astype(x.dtype)
    return x, y, norm.scale[...][:, None] * kernel, bias + norm.bias[...] @ kernel


NORMS = {"batch": batch_norm, "layer": layer_norm}


def apply_norm(norm: nnx.BatchNorm | nnx.LayerNorm, x: jax.Array, *, relu: bool) -> jax.Array:
    """`norm(x)`, with ReLU if asked for; in training it updates BatchNorm's statistics.

    On CPUs and GPUs BatchNorm has a gradient of its own, which reads `x` and the gradient twice.
    XLA's takes a third pass, since it does not know that a sum of multiples is the multiple of the
    sum.
    """
    is_batch_norm = isinstance(norm, nnx.BatchNorm) and not norm.use_running_average
    if not is_batch_norm or not (on_cpu() or on_gpu()):
        y = norm(x)
        return nnx.relu(y) if relu else y
    y, mean, var = _batch_norm(x, norm.scale[...], norm.bias[...], norm.epsilon, relu)
    for running, new in ((norm.mean, mean), (norm.var, var)):
        new = jax.lax.stop_gradient(new)
        new = norm.momentum * running[...] + (1 - norm.momentum) * new
        # `running[...] = ` would have JAX look through the whole trace: see models._Keys.
        running.set_value(new.astype(running[...].dtype))
    return y.astype(norm.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _batch_norm(x, scale, bias, epsilon, relu):
    return _batch_norm_forward(x, scale, bias, epsilon, relu)[0]


def _batch_norm_forward(x, scale, bias, epsilon, relu):
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    mean = y.mean(axes)
    var = jnp.maximum((y**2).mean(axes) - mean**2, 0)
    inv_std = jax.lax.rsqrt(var + epsilon)
    gain = inv_std * scale
    shift = bias - mean * gain
    y = y * gain + shift
    y = (nnx.relu(y) if relu else y).astype(x.dtype)
    return (y, mean, var), (x, mean, inv_std, gain, shift)


def _batch_norm_backward(epsilon, relu, residuals, grads):
    # `apply_norm` stops the gradients of mean and variance.
    x, mean, inv_std, gain, shift = residuals
    x_type, num, axes = x.dtype, x.size // x.shape[-1], tuple(range(x.ndim - 1))
    x, grad = x.astype(mean.dtype), grads[0].astype(mean.dtype)
    if relu:
        grad = jnp.where(x * gain + shift > 0, grad, 0)
    grad_bias = grad.sum(axes)
    grad_scale = ((grad * x).sum(axes) - mean * grad_bias) * inv_std
    slope = gain * inv_std * grad_scale / num
    grad_x = gain * grad - slope * x - (gain * grad_bias / num - slope * mean)
    return grad_x.astype(x_type), grad_scale, grad_bias


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
