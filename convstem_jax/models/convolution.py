"""Convolutions, in the form that is fast on the device that is traced for."""

from flax import nnx
import jax
import jax.numpy as jnp

from convstem_jax.models.linear import spread
from convstem_jax.models.target import on_cpu, on_gpu, on_tpu

# Most numbers in a layer's patches, which are kept for its kernel's gradient: 256 MiB in float32.
MAX_PATCHES = 2**26


def convolve(conv: nnx.Conv, x: jax.Array) -> jax.Array:
    """`conv(x)` for `x` of `[N, H, W, C]`.

    On CPUs it is a product of the kernel with the patches that it covers: see `is_product`.

    On GPUs the first convolution of a network has a form of its own. For 3 channels cuDNN takes as
    long as for 8, after a pass that adds the missing ones. A 3x3 convolution of stride 2 equals a
    2x2 one over squares of 2x2 pixels (space to depth) with 12 channels; XLA writes these squares
    in the same pass that normalises and mixes the images.

    Args:
        conv: has the same stride and padding for H and W; the padding is "VALID" or pairs.
        x: of any floating type.
    """
    x, kernel = x.astype(conv.dtype), conv.kernel[...].astype(conv.dtype)
    is_first = x.shape[3] == 3 and _shape(conv) == (3, 2, 1)
    if is_product(conv, x):
        y = _by_product(x, kernel, conv.feature_group_count, *_shape(conv))
    elif on_gpu() and is_first and x.shape[1] % 2 == x.shape[2] % 2 == 0:
        y = _over_squares(x, kernel)
    else:
        y = by_xla(x, kernel, conv.strides, conv.padding, conv.feature_group_count)
    return y + spread(conv.bias[...], y) if conv.use_bias else y


def by_xla(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding="VALID", num_groups: int = 1
) -> jax.Array:
    """Convolves `x` of `[N, H, W, C]` with `kernel` of `[height, width, C / num_groups, D]`."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=num_groups,
    )


def is_product(conv: nnx.Conv, x: jax.Array) -> bool:
    """Whether `convolve` multiplies the patches that the kernel covers.

    On CPUs XLA copies the images into other layouts for the gradients of convolutions, with one
    thread, and for grouped convolutions these gradients are 30 times slower (jax-ml/jax#13800).
    Left to XLA are kernels larger than 3x3, whose patches do not overlap; ungrouped convolutions in
    bfloat16, in whose gradient a sum of nine would be rounded nine times; and what would take too
    much memory.
    """
    if on_gpu() or on_tpu():
        return False
    if conv.feature_group_count == 1 and (not on_cpu() or conv.dtype == jnp.bfloat16):
        return False
    size, stride, pad = _shape(conv)
    if size == 1 or size > 3:
        return size == 1
    if not isinstance(x.shape[0], int):  # `jax.export` with any number of images
        return False
    height, width = ((n + 2 * pad - size) // stride + 1 for n in x.shape[1:3])
    return x.shape[0] * height * width * size**2 * x.shape[3] <= MAX_PATCHES


def _shape(conv):
    """Kernel's size, stride and padding."""
    return conv.kernel_size[0], conv.strides, 0 if conv.padding == "VALID" else conv.padding[0][0]


def _by_product(x, kernel, num_groups, *shape):
    if num_groups == 1:
        return _multiply_patches(x, kernel, *shape)
    # Axes are moved before the patches are made, which hold more numbers than the images.
    x = jnp.moveaxis(x.reshape(*x.shape[:3], num_groups, kernel.shape[2]), 3, 0)
    kernel = jnp.moveaxis(kernel.reshape(*kernel.shape[:3], num_groups, -1), 3, 0)
    y = jax.vmap(lambda x, kernel: _multiply_patches(x, kernel, *shape))(x, kernel)
    y = jnp.moveaxis(y, 0, 3)
    return y.reshape(*y.shape[:3], y.shape[3] * y.shape[4])


def _multiply_patches(x, kernel, size, stride, pad):
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = (n - size + 1 for n in x.shape[1:3])  # places at stride 1
    starts = [(i, j) for i in range(size) for j in range(size)]
    shifted = [x[:, i : i + height : stride, j : j + width : stride] for i, j in starts]
    patches = jnp.concatenate(shifted, axis=3)  # [N, H', W', size * size * C]
    # Two matrices: for the kernel's gradient XLA would copy an array of more axes, transposed.
    y = patches.reshape(-1, patches.shape[3]) @ kernel.reshape(-1, kernel.shape[3])
    return y.reshape(*patches.shape[:3], kernel.shape[3])


def _over_squares(x, kernel):
    x = _space_to_depth(x)
    # The first row and column of the squares' kernel are for pixels that the 3x3 does not reach.
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = jnp.moveaxis(_space_to_depth(jnp.moveaxis(kernel, 3, 0)), 0, 3)
    return by_xla(
        jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 4))),  # to 16 channels, a multiple of 8
        jnp.pad(kernel, ((0, 0), (0, 0), (0, 4), (0, 0))),
    )


def _space_to_depth(x: jax.Array) -> jax.Array:
    """`[N, 2H, 2W, C]` to `[N, H, W, 4C]`."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // 2, width // 2, 4 * channels)
