"""The two stems of the paper (section 3): patchify, and a few 3x3 convolutions."""

from collections.abc import Sequence
import math

from flax import nnx
import jax
from jax.nn import initializers
import jax.numpy as jnp

# torch.nn.Conv2d's and torch.nn.Linear's default: uniform in +-sqrt(1 / fan_in).
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class PatchifyStem(nnx.Module):
    """One patch_size x patch_size convolution of stride patch_size (ViT_P).

    Maps `[N, H, W, 3]` to `[N, H / patch_size, W / patch_size, width]`.
    """

    def __init__(self, patch_size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        std = math.sqrt(1 / (3 * patch_size**2))
        self.projection = nnx.Conv(
            3,
            width,
            kernel_size=(patch_size, patch_size),
            strides=patch_size,
            padding="VALID",
            # The authors cut at +-2 in absolute value; JAX counts the cut in standard deviations.
            kernel_init=initializers.truncated_normal(std, lower=-2 / std, upper=2 / std),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.projection(images)


class ConvStem(nnx.Module):
    """3x3 convolutions, each with BatchNorm and ReLU, then a 1x1 convolution (ViT_C).

    Maps `[N, H, W, 3]` to `[N, H / s, W / s, width]`, with s the product of `strides`.

    Args:
      channels: output channels of each 3x3 convolution.
      strides: stride of each 3x3 convolution.
      width: output channels of the last 1x1 convolution.
      dtype: type to compute in; parameters and statistics are float32.
      rngs: random keys of the initialisation.

    Raises:
      ValueError: `channels` and `strides` differ in length.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        width: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if len(channels) != len(strides):
            raise ValueError(
                f"the stem has channels {tuple(channels)} but strides {tuple(strides)}: "
                "give one of each for every 3x3 convolution"
            )
        convs, norms = [], []
        for num_in, num_out, stride in zip((3, *channels), channels, strides, strict=False):
            convs.append(
                nnx.Conv(
                    num_in,
                    num_out,
                    kernel_size=(3, 3),
                    strides=stride,
                    # Not "SAME": at stride 2 that pads (0, 1): equal shapes, other values.
                    padding=((1, 1), (1, 1)),
                    use_bias=False,
                    kernel_init=torch_uniform,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            # Flax's momentum 0.9 is torch's 0.1. Differs from the paper: the statistics are over
            # the global batch, and the running variance is the biased one.
            norms.append(nnx.BatchNorm(num_out, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs))
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms)
        self.projection = nnx.Conv(
            channels[-1],
            width,
            kernel_size=(1, 1),
            kernel_init=initializers.normal(math.sqrt(2 / width)),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.projection(x)
