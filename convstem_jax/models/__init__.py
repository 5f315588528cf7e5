"""Every model by name."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from convstem_jax.models.regnet import REGNETS, RegNet, RegNetSpec
from convstem_jax.models.vit import VITS, ViT, ViTSpec

__all__ = ["MODELS", "create_model"]

# name -> what the network's class is given
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
    keys = _Keys(rngs.params)
    model = network(spec, num_classes=num_classes, dtype=dtype, rngs=keys)
    keys.close()
    model.eval()
    return model


class _Keys:
    """Gives the keys that a stream of `nnx.Rngs` would give, and counts them in Python.

    `nnx.Rngs` counts in an array. JAX before 0.12 looks through all that it has traced so far
    whenever Flax overwrites a traced array (https://github.com/jax-ml/jax/pull/40041), which would
    be three quarters of the time in which a model is traced.
    """

    def __init__(self, stream: nnx.RngStream):
        self._stream, self._num = stream, 0

    def params(self) -> jax.Array:
        """The next key; layers ask for it by this name."""
        key = jax.random.fold_in(self._stream.key[...], self._stream.count[...] + self._num)
        self._num += 1
        return key

    def close(self) -> None:
        """Lets the stream go on where the keys ended."""
        self._stream.count[...] += self._num
