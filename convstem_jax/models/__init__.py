"""Every model by name."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from convstem_jax.models.regnet import REGNETS, RegNet, RegNetSpec
from convstem_jax.models.vit import VITS, ViT, ViTSpec

__all__ = ["MODELS", "create_model"]

# name -> the spec that the network's class is given
MODELS: dict[str, ViTSpec | RegNetSpec] = VITS | REGNETS


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
    **changes,
) -> nnx.Module:
    """Builds a model, e.g. `create_model("vitc_4gf", rngs=nnx.Rngs(0))`, in evaluation mode.

    Args:
        name: a key of `MODELS`, such as `vitp_1gf`, `vitc_18gf` or `regnety_4gf`.
        num_classes: number of logits.
        dtype: type to compute in, `jnp.bfloat16` or `jnp.float32`. Parameters are float32.
        rngs: random keys of the initialisation.
        **changes: fields of the model's spec to replace, such as `image_size` or `patch_size`.

    Returns:
        A module that maps `[N, H, W, 3]` normalised images to `[N, num_classes]` float32 logits.

    Raises:
        ValueError: the name is unknown, or the sizes do not fit together.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(MODELS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: it must be 1 or more")
    spec = MODELS[name]
    network = ViT if isinstance(spec, ViTSpec) else RegNet
    fields = [field.name for field in dataclasses.fields(spec)]
    for field, value in changes.items():
        if field not in fields:
            raise ValueError(f"{name} has no field '{field}': it has {', '.join(fields)}")
        if isinstance(value, list):
            changes[field] = tuple(value)
    spec = dataclasses.replace(spec, **changes)
    model = network(spec, num_classes=num_classes, dtype=dtype, rngs=_Keys(rngs.params))
    model.eval()
    return model


class _Keys:
    """Gives the keys of a stream of `nnx.Rngs`, and advances its count.

    The stream itself counts by `count[...] = `, for which Flax asks the traced array whether it has
    a sharding. It has none, and JAX before 0.12 searches all that it has traced to say so
    (https://github.com/jax-ml/jax/pull/40041): more than half of the time to trace a model.
    """

    def __init__(self, stream: nnx.RngStream):
        self._stream = stream

    def params(self) -> jax.Array:
        """The next key; layers ask for it by this name."""
        count = self._stream.count
        key = jax.random.fold_in(self._stream.key[...], count[...])
        count.set_value(count[...] + 1)
        return key
