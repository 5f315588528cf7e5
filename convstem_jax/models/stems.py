"""The two stems of the paper (section 3) and their variants (Table 3, Figure 7)."""

from collections.abc import Callable, Sequence
import functools
import math

from flax import nnx
import jax
from jax.nn import initializers
import jax.numpy as jnp

from convstem_jax.models import strips
from convstem_jax.models.convolution import convolve
from convstem_jax.models.norms import NORMS, apply_norm
from convstem_jax.models.target import overflows_in_fused_gradients

# torch.nn.Conv2d's and torch.nn.Linear's default: uniform in +-sqrt(1 / fan_in).
torch_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")

INITS = ("paper", "later")


class PatchifyStem(nnx.Module):
    """One patch_size x patch_size convolution of stride patch_size (ViT_P).

    Maps `[N, H, W, 3]` to `[N, H / patch_size, W / patch_size, width]`.

    Args:
        patch_size: size and stride of the convolution.
        width: output channels.
        norm: a key of `NORMS`, followed by ReLU (Figure 7); None for neither, as in ViT_P.
        dtype: type to compute in; parameters and statistics are float32.
        rngs: random keys of the initialisation.
    """

    def __init__(
        self,
        patch_size: int,
        width: int,
        *,
        norm: str | None = None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
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
        self.norm = NORMS[norm](width, dtype=dtype, rngs=rngs) if norm else None

    def __call__(self, images: jax.Array) -> jax.Array:
        x = convolve(self.projection, images)
        return x if self.norm is None else apply_norm(self.norm, x, relu=True)


class ConvStem(nnx.Module):
    """A few convolutions, each with a norm and ReLU, then a 1x1 convolution (ViT_C).

    Maps `[N, H, W, 3]` to `[N, H / s, W / s, width]`, with s the product of `strides`.

    Args:
        kernels: size of each convolution before the last: 3 in ViT_C. A 3x3 is padded by 1 on both
            sides, the larger ones of Table 3 are not padded.
        channels: output channels of each.
        strides: stride of each.
        width: output channels of the last 1x1 convolution.
        norm: a key of `NORMS`: batch in ViT_C, layer in Figure 7.
        init: "paper" as in the authors' code of mid-2021, "later" as in that of 2022.
        dtype: type to compute in; parameters and statistics are float32.
        rngs: random keys of the initialisation.

    Raises:
        ValueError: `kernels`, `channels` and `strides` differ in length.
    """

    def __init__(
        self,
        kernels: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        width: int,
        *,
        norm: str = "batch",
        init: str = "paper",
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if not len(kernels) == len(channels) == len(strides):
            raise ValueError(
                f"the stem has kernels {tuple(kernels)}, channels {tuple(channels)} and strides "
                f"{tuple(strides)}: give one of each for every convolution before the last"
            )
        # In both codes the fan-out is only the number of output channels.
        last_std = math.sqrt({"paper": 2, "later": 1}[init] / width)
        convs, norms = [], []
        for kernel, num_in, num_out, stride in zip(
            kernels, (3, *channels), channels, strides, strict=False
        ):
            # Not "SAME", which at stride 2 pads (0, 1): equal shapes, other values.
            pad = 1 if kernel == 3 else 0
            convs.append(
                nnx.Conv(
                    num_in,
                    num_out,
                    kernel_size=(kernel, kernel),
                    strides=stride,
                    padding=((pad, pad), (pad, pad)),
                    use_bias=False,
                    kernel_init=torch_uniform
                    if init == "paper"
                    else initializers.normal(math.sqrt(2 / num_out)),
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            norms.append(NORMS[norm](num_out, dtype=dtype, rngs=rngs))
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms)
        self.projection = nnx.Conv(
            channels[-1],
            width,
            kernel_size=(1, 1),
            padding="VALID",
            kernel_init=initializers.normal(last_std),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        num, num_layers = strips.plan(self.convs, images)
        x = images
        if num > 1:
            on_strips = functools.partial(strips.convolve, num=num)
            x = strips.cut(x.astype(self.convs[0].dtype), num)
            x = strips.join(self._layers(x, on_strips, slice(num_layers)), num)
        return convolve(self.projection, self._layers(x, convolve, slice(num_layers, None)))

    def _layers(self, x: jax.Array, apply_conv: Callable, which: slice) -> jax.Array:
        for conv, norm in [*zip(self.convs, self.norms, strict=True)][which]:
            x = apply_norm(norm, apply_conv(conv, x), relu=True)
            if overflows_in_fused_gradients():
                x = _fuse_gradient_apart(x)
        return x


@jax.custom_vjp
def _fuse_gradient_apart(x: jax.Array) -> jax.Array:
    """Keeps what computes the gradient of `x` and what uses it in separate kernels.

    Where the compiler can fuse the two, it estimates 2 to 3 % less for a step of ViT_C-1GF or 4GF.
    """
    return x


_fuse_gradient_apart.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))
