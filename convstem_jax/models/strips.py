"""A stem's first layers on strips of the images, for TPUs that have few images each.

Where layers have few channels, TPUs lay either these or the images along their 128 lanes. With 24
channels and 32 images most lanes stay empty. So each image is cut into four or eight strips, which
count as images: a convolution is also given the column to the left of each strip, and BatchNorm
sums over the strips what it would sum over the images.
"""

from collections.abc import Sequence

from flax import nnx
import jax
import jax.numpy as jnp

from convstem_jax.models.convolution import by_xla
from convstem_jax.models.target import by_device, num_devices, on_tpu

LANES = 128


def plan(convs: Sequence[nnx.Conv], images: jax.Array) -> tuple[int, int]:
    """Into how many strips to cut each image, and for how many of the first layers.

    Args:
        convs: the stem's convolutions.
        images: `[N, H, W, C]`.

    Returns:
        Two numbers; (1, 0) where it does not pay, according to docs/performance_trials.md.
    """
    whole = 1, 0
    if not on_tpu() or not num_devices() or convs[0].out_features >= LANES // 2:
        return whole
    images_on_device = len(images) // num_devices()
    if not 16 <= images_on_device <= 32:  # With more, 4GF gets slower.
        return whole
    num = 2 ** ((LANES // images_on_device).bit_length() - 1)
    width, num_layers = images.shape[2] / num, 0
    for conv in convs:
        if conv.kernel_size != (3, 3) or conv.strides != 2 or width % 2:
            break
        width, num_layers = width / 2, num_layers + 1
    return (num, num_layers) if num_layers > 1 else whole


def cut(images: jax.Array, num: int) -> jax.Array:
    """`[N, H, W, C]` to `[num N, H, W / num, C]`: on each device all leftmost strips come first."""

    def cut_own(x):
        n, h, w, c = x.shape
        x = x.reshape(n, h, num, w // num, c).transpose(2, 0, 1, 3, 4)
        return x.reshape(num * n, h, w // num, c)

    return by_device(cut_own)(images)


def join(strips: jax.Array, num: int) -> jax.Array:
    """`[num N, H, W / num, C]` to `[N, H, W, C]`."""

    def join_own(x):
        n, h, w, c = x.shape
        x = x.reshape(num, n // num, h, w, c).transpose(1, 2, 0, 3, 4)
        return x.reshape(n // num, h, num * w, c)

    return by_device(join_own)(strips)


def convolve(conv: nnx.Conv, strips: jax.Array, num: int) -> jax.Array:
    """A 3x3 convolution of stride 2, padded by 1: `[num N, H, W, C]` to `[num N, H / 2, W / 2, D]`.

    W must be even, so that no strip needs a column of the one to its right.
    """

    def convolve_own(x, kernel):
        n = len(x) // num
        left = jnp.pad(x[:-n, :, -1:], ((n, 0), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([left, x], axis=2)
        return by_xla(x, kernel.astype(x.dtype), stride=2, padding=((1, 1), (0, 0)))

    return by_device(convolve_own)(strips, conv.kernel[...])
