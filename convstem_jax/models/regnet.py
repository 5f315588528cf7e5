"""RegNetY, the paper's CNN baseline (Table 2): convolutional blocks with squeeze-and-excitation."""

import dataclasses
import functools
import math

from flax import nnx
import jax
from jax.nn import initializers
import jax.numpy as jnp

from convstem_jax.models.convolution import by_xla, convolve, is_product
from convstem_jax.models.images import check_images
from convstem_jax.models.linear import Linear, spread
from convstem_jax.models.norms import apply_norm, batch_norm
from convstem_jax.models.target import by_device, on_tpu

# The authors' "fan out" counts all output channels, even of grouped convolutions.
_kernel_init = initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class RegNetSpec:
    """Stages of a RegNetY: a convolution of stride 2, then stages whose first block has stride 2.

    Not the networks of the same names in RegNet model zoos: the paper's are scaled for their flops
    at `image_size`.
    """

    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...]  # channels of each stage
    group_width: int  # channels of a group of the 3x3 convolutions
    image_size: int  # in training; the network takes any
    stem_width: int = 32
    se_ratio: float = 0.25  # squeezed channels, as a fraction of the block's input


REGNETS = {
    "regnety_1gf": RegNetSpec((1, 4, 10, 3), (40, 120, 328, 904), 4, 232),
    "regnety_4gf": RegNetSpec((2, 6, 16, 2), (96, 192, 512, 1216), 32, 240),
    "regnety_16gf": RegNetSpec((2, 7, 18, 2), (168, 336, 896, 2128), 56, 256),
    "regnety_32gf": RegNetSpec((2, 7, 20, 2), (216, 432, 1152, 2808), 72, 268),
    # Not in the paper: three stages for 32x32, at about the flops of vitc_tiny.
    "regnety_tiny": RegNetSpec((1, 4, 3), (32, 64, 128), 16, 32),
}


def _conv(
    num_in: int,
    num_out: int,
    size: int,
    stride: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    num_groups: int = 1,
) -> nnx.Conv:
    """A size x size convolution without bias, padded so that stride 1 keeps the grid."""
    pad = size // 2
    return nnx.Conv(
        num_in,
        num_out,
        kernel_size=(size, size),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        feature_group_count=num_groups,
        use_bias=False,
        kernel_init=_kernel_init,
        dtype=dtype,
        rngs=rngs,
    )


class GroupedConv(nnx.Module):
    """3x3 convolution in groups, on `[N, H, W, width]`.

    TPUs multiply 128 channels by 128 at once, however narrow a group is. So on TPUs narrow groups
    are merged into wider ones, whose kernels are zero between the old ones.

    XLA gathers a batch that is sharded over devices on each of them (openxla/xla#47945). So each
    device is given only its part of the batch where the mesh in use has an axis `data`.
    """

    def __init__(
        self, width: int, group_width: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.num_groups = width // group_width
        self.conv = _conv(width, width, 3, stride, dtype, rngs, self.num_groups)

    def __call__(self, x: jax.Array) -> jax.Array:
        if is_product(self.conv, x):
            return convolve(self.conv, x)
        x, kernel = x.astype(self.conv.dtype), self.conv.kernel[...].astype(self.conv.dtype)
        num_groups = self.num_groups
        if on_tpu():
            num = _groups_to_merge(num_groups, kernel.shape[2])
            kernel, num_groups = _merge_groups(kernel, num), num_groups // num
        stride, padding = self.conv.strides, self.conv.padding
        form = functools.partial(by_xla, stride=stride, padding=padding, num_groups=num_groups)
        return by_device(form)(x, kernel)


def _groups_to_merge(num_groups: int, group_width: int) -> int:
    """How many groups TPUs convolve as one: see docs/performance_trials.md."""
    width = num_groups * group_width
    if num_groups <= 8 or width <= 128:
        return num_groups
    fits = width % 128 == 0 and 128 % group_width == 0
    return 128 // group_width if fits else 1


def _merge_groups(kernel: jax.Array, num: int) -> jax.Array:
    """Kernel `[3, 3, w, width]` of a grouped convolution, as `[3, 3, num w, width]`.

    Every `num` groups become one; zeros keep them apart.
    """
    if num == 1:
        return kernel
    height, breadth, w, width = kernel.shape
    kernel = kernel.reshape(height, breadth, 1, w, width // (num * w), num, w)
    apart = jnp.eye(num, dtype=kernel.dtype)[:, None, None, :, None]  # [num, 1, 1, num, 1]
    return (kernel * apart).reshape(height, breadth, num * w, width)


class SqueezeExcite(nnx.Module):
    """Scales each channel by a function of all channels' means, on `[N, H, W, width]`."""

    def __init__(self, width: int, squeezed: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def linear(num_in, num_out):
            bound = 1 / math.sqrt(num_in)  # as in torch's default for biases
            return Linear(
                num_in,
                num_out,
                kernel_init=_kernel_init,
                bias_init=lambda key, shape, dtype: jax.random.uniform(
                    key, shape, dtype, -bound, bound
                ),
                dtype=dtype,
                rngs=rngs,
            )

        self.fc1 = linear(width, squeezed)
        self.fc2 = linear(squeezed, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = nnx.sigmoid(self.fc2(nnx.relu(self.fc1(x.mean(axis=(1, 2))))))  # [N, C]
        return x * spread(scale[:, None, None], x)


class Block(nnx.Module):
    """1x1, grouped 3x3, squeeze-and-excitation, 1x1, and a shortcut; bottleneck ratio 1."""

    def __init__(
        self,
        num_in: int,
        width: int,
        stride: int,
        *,
        group_width: int,
        se_ratio: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.conv1 = _conv(num_in, width, 1, 1, **kwargs)
        self.norm1 = batch_norm(width, **kwargs)
        self.conv2 = GroupedConv(width, group_width, stride, **kwargs)
        self.norm2 = batch_norm(width, **kwargs)
        self.se = SqueezeExcite(width, round(num_in * se_ratio), **kwargs)
        self.conv3 = _conv(width, width, 1, 1, **kwargs)
        self.norm3 = batch_norm(width, **kwargs)
        if stride != 1 or num_in != width:
            self.shortcut = _conv(num_in, width, 1, stride, **kwargs)
            self.shortcut_norm = batch_norm(width, **kwargs)
        else:
            self.shortcut = None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = apply_norm(self.norm1, convolve(self.conv1, x), relu=True)
        y = apply_norm(self.norm2, self.conv2(y), relu=True)
        y = apply_norm(self.norm3, convolve(self.conv3, self.se(y)), relu=False)
        if self.shortcut is not None:
            x = apply_norm(self.shortcut_norm, convolve(self.shortcut, x), relu=False)
        return nnx.relu(x + y)


class RegNet(nnx.Module):
    """RegNetY: `[N, H, W, 3]` normalised images to `[N, num_classes]` float32 logits.

    Args:
        spec: shape of the network.
        num_classes: number of logits.
        dtype: type to compute in, bfloat16 or float32; parameters and statistics are float32.
        rngs: random keys of the initialisation.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self, spec: RegNetSpec, *, num_classes: int, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        _check(spec)
        kwargs = {"dtype": dtype, "rngs": rngs}
        self.stem = _conv(3, spec.stem_width, 3, 2, **kwargs)
        self.stem_norm = batch_norm(spec.stem_width, **kwargs)
        stages, num_in = [], spec.stem_width
        for depth, width in zip(spec.depths, spec.widths, strict=True):
            blocks = []
            for i in range(depth):
                blocks.append(
                    Block(
                        num_in,
                        width,
                        stride=1 if i else 2,
                        group_width=spec.group_width,
                        se_ratio=spec.se_ratio,
                        **kwargs,
                    )
                )
                num_in = width
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = Linear(
            num_in,
            num_classes,
            kernel_init=initializers.normal(0.01),
            dtype=jnp.float32,  # as in ViT
            rngs=rngs,
        )
        self.spec = spec
        self.dtype = dtype

    def __call__(self, images: jax.Array) -> jax.Array:
        check_images(images)
        x = apply_norm(self.stem_norm, convolve(self.stem, images), relu=True)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2), dtype=jnp.float32))


def _check(spec: RegNetSpec) -> None:
    if len(spec.depths) != len(spec.widths):
        raise ValueError(
            f"depths {spec.depths} and widths {spec.widths} must name the same number of stages"
        )
    sizes = (*spec.depths, *spec.widths, spec.group_width, spec.stem_width, spec.image_size)
    if min(sizes) < 1:
        raise ValueError(f"every size of {spec} must be 1 or more")
    for width in spec.widths:
        if width % spec.group_width:
            raise ValueError(
                f"width {width} is not a multiple of the group width {spec.group_width}"
            )
