"""The linear layer, and how parameters are broadcast to the numbers that share them."""

from flax import nnx
import jax
import jax.numpy as jnp


class Linear(nnx.Linear):
    """`x @ kernel + bias` on `[..., C]`, in `dtype`; the bias's gradient is summed in float32."""

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(self.dtype)
        return linear(x, self.kernel[...], self.bias[...])


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`x @ kernel + bias` in the type of `x`, whatever those of `kernel` and `bias`."""
    y = jnp.tensordot(x, kernel.astype(x.dtype), axes=1)
    return y + spread(bias, y)


def spread(parameter: jax.Array, like: jax.Array) -> jax.Array:
    """`parameter` in the shape, type and (where a mesh has explicit axes) sharding of `like`.

    Its gradient is a sum over all numbers that share it. Flax rounds a parameter before spreading
    it, so that in bfloat16 each partial sum of the gradient is rounded; here it is rounded last,
    and the sums are float32.
    """
    parameter = parameter.astype(jnp.promote_types(parameter.dtype, jnp.float32))
    sharding = jax.typeof(like).sharding
    return jnp.broadcast_to(parameter, like.shape, out_sharding=sharding).astype(like.dtype)
