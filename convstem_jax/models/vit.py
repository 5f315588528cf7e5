"""Vision transformers with either stem: ViT_P and ViT_C (section 3, Table 1)."""

import dataclasses
import math

from flax import nnx
import jax
from jax.nn import initializers
import jax.numpy as jnp

from convstem_jax.models import attention, stems
from convstem_jax.models.attention import pin_layout
from convstem_jax.models.gelu import gelu
from convstem_jax.models.images import check_images
from convstem_jax.models.linear import Linear, linear, spread
from convstem_jax.models.norms import NORMS, before_linear, layer_norm


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """One row of the paper's Table 1. Without `stem_channels` the stem is the patchify one."""

    width: int
    mlp_dim: int
    num_heads: int
    depth: int
    stem_channels: tuple[int, ...] = ()
    stem_strides: tuple[int, ...] = ()
    stem_kernels: tuple[int, ...] = ()  # 3 for each, where not given
    stem_norm: str | None = None  # a key of `NORMS`; the paper's own, where not given
    stem_init: str = "paper"  # of the convolutional stem, one of `stems.INITS`
    patch_size: int = 16
    image_size: int = 224


_STEM_18GF = {
    "stem_channels": (64, 128, 128, 256, 256, 512),
    "stem_strides": (2, 2, 1, 2, 1, 2),
}
_STRIDES = (2, 2, 2, 2)

VITS = {
    "vitp_1gf": ViTSpec(192, 576, 3, 12),
    "vitp_4gf": ViTSpec(384, 1152, 6, 12),
    "vitp_18gf": ViTSpec(768, 3072, 12, 12),
    "vitp_36gf": ViTSpec(1024, 4096, 16, 14),
    "vitp_72gf": ViTSpec(1152, 4608, 18, 22),
    "vitc_1gf": ViTSpec(192, 576, 3, 11, (24, 48, 96, 192), _STRIDES),
    "vitc_4gf": ViTSpec(384, 1152, 6, 11, (48, 96, 192, 384), _STRIDES),
    "vitc_18gf": ViTSpec(768, 3072, 12, 11, **_STEM_18GF),
    # A stem that doubles up to width 1024 would cost more than a block: the paper keeps 18GF's.
    "vitc_36gf": ViTSpec(1024, 4096, 16, 13, **_STEM_18GF),
    "vitc_72gf": ViTSpec(1152, 4608, 18, 22, **_STEM_18GF),
    # Not in the paper: 1GF's rules at 32x32. MLP ratio 3, channels that double up to the width at
    # stride 2 down to the patchify stem's grid, a stem of about one block's cost, one block fewer.
    # Two heads of 32, where the paper has heads of 64.
    "vitp_tiny": ViTSpec(64, 192, 2, 4, patch_size=8, image_size=32),
    "vitc_tiny": ViTSpec(64, 192, 2, 3, (16, 32, 64), (2, 2, 2), patch_size=8, image_size=32),
}


# Stems that downsample later and later, at equal flops (Table 3; its 42 for S1 should be 52).
for name, kernels, channels, strides in (
    ("s1", (3, 3, 3, 2), (52, 104, 208, 416), (2, 2, 2, 2)),
    ("s2", (3, 3, 3, 4), (32, 64, 128, 256), (2, 2, 1, 4)),
    ("s3", (3, 3, 3, 8), (17, 34, 68, 136), (2, 1, 1, 8)),
    ("s4", (3, 3, 3, 16), (8, 16, 32, 64), (1, 1, 1, 16)),
):
    VITS[f"vitc_4gf_{name}"] = ViTSpec(384, 1152, 6, 11, channels, strides, kernels)
# The same for 32x32, where patches of 8 leave room for three.
for name, kernels, channels, strides in (
    ("s1", (3, 3, 2), (18, 36, 72), (2, 2, 2)),
    ("s2", (3, 3, 4), (10, 20, 40), (2, 1, 4)),
    ("s3", (3, 3, 8), (5, 10, 20), (1, 1, 8)),
):
    VITS[f"vitc_tiny_{name}"] = dataclasses.replace(
        VITS["vitc_tiny"], stem_channels=channels, stem_strides=strides, stem_kernels=kernels
    )
# Models with the other norm (Figure 7), and four times as deep ones (Figure 8).
for size in ("4gf", "tiny"):
    p, c = VITS[f"vitp_{size}"], VITS[f"vitc_{size}"]
    VITS[f"vitp_{size}_bn"] = dataclasses.replace(p, stem_norm="batch")
    VITS[f"vitc_{size}_ln"] = dataclasses.replace(c, stem_norm="layer")
    VITS[f"vitp_{size}_deep"] = dataclasses.replace(p, depth=4 * p.depth)
    VITS[f"vitc_{size}_deep"] = dataclasses.replace(c, depth=4 * p.depth - 1)


class Attention(nnx.Module):
    """Multi-head self-attention; query, key and value share a parameter.

    Takes tokens `[N, T, width]`, how many of the T are attended to, and kernel and bias of `qkv` as
    `before_linear` returns them. Returns `[N, T, width]`, or `[N, 1, width]` if only the class
    token, the first, is to attend.
    """

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = Linear(
            width, 3 * width, kernel_init=initializers.xavier_uniform(), dtype=dtype, rngs=rngs
        )
        self.out = Linear(width, width, kernel_init=stems.torch_uniform, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        num_tokens: int,
        kernel: jax.Array,
        bias: jax.Array,
        *,
        class_token_only: bool,
    ) -> jax.Array:
        attend_from = attention.of_class_token if class_token_only else attention.of_all_tokens
        return self.out(attend_from(x, kernel, bias, self.num_heads, num_tokens))


class MLP(nnx.Module):
    """Two layers, with the exact (erf) GELU between them.

    Takes tokens `[N, T, width]`, and kernel and bias of `fc1` as `before_linear` returns them.
    """

    def __init__(self, width: int, mlp_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inits = {
            "kernel_init": initializers.xavier_uniform(),
            "bias_init": initializers.normal(1e-6),
        }
        self.fc1 = Linear(width, mlp_dim, dtype=dtype, rngs=rngs, **inits)
        self.fc2 = Linear(mlp_dim, width, dtype=dtype, rngs=rngs, **inits)

    def __call__(self, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return self.fc2(gelu(pin_layout(linear(x, kernel, bias))))


class Block(nnx.Module):
    """Pre-norm transformer block on `[N, T, width]`.

    With `class_token_only` it returns only the first token, `[N, 1, width]`.
    """

    def __init__(
        self, width: int, mlp_dim: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.norm1 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, mlp_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, num_tokens: int, *, class_token_only: bool) -> jax.Array:
        x, y, *qkv = before_linear(self.norm1, self.attention.qkv, x)
        y = self.attention(y, num_tokens, *qkv, class_token_only=class_token_only)
        x = pin_layout((x[:, :1] if class_token_only else x) + y)
        x, y, *fc1 = before_linear(self.norm2, self.mlp.fc1, x)
        return pin_layout(x + self.mlp(y, *fc1))


class ViT(nnx.Module):
    """Vision transformer: `[N, H, W, 3]` normalised images to `[N, num_classes]` float32 logits.

    The head reads only the class token, so the last block is computed only for this token, which
    saves nearly all of that block. `all_tokens=True` computes the block for all tokens, as the
    paper counts it, and gives the same logits.

    Args:
        spec: shape of the network.
        num_classes: number of logits.
        dtype: type to compute in, bfloat16 or float32; parameters and statistics are float32.
        rngs: random keys of the initialisation (paper-era, from the authors' code).

    Raises:
        ValueError: heads, patches or strides do not divide as the architecture needs.
    """

    def __init__(
        self, spec: ViTSpec, *, num_classes: int, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        _check(spec)
        width, kwargs = spec.width, {"dtype": dtype, "rngs": rngs}
        if spec.stem_channels:
            self.stem = stems.ConvStem(
                spec.stem_kernels or (3,) * len(spec.stem_channels),
                spec.stem_channels,
                spec.stem_strides,
                width,
                norm=spec.stem_norm or "batch",
                init=spec.stem_init,
                **kwargs,
            )
        else:
            self.stem = stems.PatchifyStem(spec.patch_size, width, norm=spec.stem_norm, **kwargs)
        num_tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.position_embedding = nnx.Param(
            initializers.normal(0.02)(rngs.params(), (1, num_tokens, width))
        )
        self.blocks = nnx.List(
            Block(width, spec.mlp_dim, spec.num_heads, **kwargs) for _ in range(spec.depth)
        )
        self.norm = layer_norm(width, **kwargs)
        # In float32: logits near 10 lie 0.06 apart in bfloat16, where ties decide an argmax.
        self.head = Linear(
            width, num_classes, kernel_init=initializers.zeros, dtype=jnp.float32, rngs=rngs
        )
        self.spec = spec
        self.dtype = dtype

    def __call__(self, images: jax.Array, *, all_tokens: bool = False) -> jax.Array:
        check_images(images, self.spec.image_size)
        x = self.stem(images)  # [N, H / p, W / p, d]
        n, h, w, d = x.shape
        x = x.reshape(n, h * w, d)
        class_token = spread(self.class_token[...], x[:, :1])
        x = jnp.concatenate([class_token, x], axis=1)  # [N, T, d]
        x = x + spread(self.position_embedding[...], x)
        num_tokens = x.shape[1]
        x = pin_layout(attention.pad(x, self.spec.num_heads))
        for i, block in enumerate(self.blocks, 1):
            is_last = i == len(self.blocks)
            x = block(x, num_tokens, class_token_only=is_last and not all_tokens)
        # The norm acts on each token separately.
        return self.head(self.norm(x[:, 0]))


def _check(spec: ViTSpec) -> None:
    kernels, strides = spec.stem_kernels, spec.stem_strides
    for name in ("width", "mlp_dim", "num_heads", "patch_size", "image_size"):
        if (size := getattr(spec, name)) < 1:
            raise ValueError(f"{name} is {size}: it must be 1 or more")
    for name in ("stem_channels", "stem_strides", "stem_kernels"):
        if min(sizes := getattr(spec, name), default=1) < 1:
            raise ValueError(f"{name} are {sizes}: each must be 1 or more")
    if (strides or kernels) and not spec.stem_channels:
        raise ValueError(
            f"strides {strides} and kernels {kernels} are given to a stem without channels"
        )
    for field, known in (("stem_norm", (None, *NORMS)), ("stem_init", stems.INITS)):
        if (value := getattr(spec, field)) not in known:
            raise ValueError(f"{field} is {value!r}: it must be one of {known}")
    if spec.stem_init != "paper" and not spec.stem_channels:
        raise ValueError(f"stem_init={spec.stem_init!r} is of the convolutional stem: leave it out")
    if any(kernel > max(3, stride) for kernel, stride in zip(kernels, strides, strict=False)):
        raise ValueError(
            f"the stem's kernels {kernels} are neither 3 nor at most its strides {strides}, and "
            "would not reach the patchify stem's grid"
        )
    if spec.width % spec.num_heads:
        raise ValueError(f"width {spec.width} is not a multiple of {spec.num_heads} heads")
    if spec.image_size % spec.patch_size:
        nearest = max(1, round(spec.image_size / spec.patch_size)) * spec.patch_size
        raise ValueError(
            f"image size {spec.image_size} is not a multiple of patch size {spec.patch_size}: "
            f"the nearest that is one is {nearest}"
        )
    stride = math.prod(spec.stem_strides)
    if spec.stem_channels and stride != spec.patch_size:
        raise ValueError(
            f"the stem's strides {spec.stem_strides} multiply to {stride}, but the patch size is "
            f"{spec.patch_size}: the two stems must reach the same grid"
        )
