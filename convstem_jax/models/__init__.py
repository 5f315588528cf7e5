"""Every model by name."""

import dataclasses
import functools

from flax import nnx
import jax.numpy as jnp

from convstem_jax.models.vit import VITS, ViT, ViTSpec

__all__ = ["MODELS", "create_model"]


def _create_vit(
    spec: ViTSpec, *, num_classes: int, dtype: jnp.dtype, rngs: nnx.Rngs, **changes
) -> ViT:
    fields = [field.name for field in dataclasses.fields(spec)]
    for name, value in changes.items():
        if name not in fields:
            raise ValueError(f"a ViT has no field '{name}': it has {', '.join(fields)}")
        if isinstance(value, list):
            changes[name] = tuple(value)
    spec = dataclasses.replace(spec, **changes)
    return ViT(spec, num_classes=num_classes, dtype=dtype, rngs=rngs)


MODELS = {name: functools.partial(_create_vit, spec) for name, spec in VITS.items()}


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
    **changes,
) -> nnx.Module:
    """Builds a model, e.g. `create_model("vitc_4gf", rngs=nnx.Rngs(0))`.

    Args:
      name: a key of `MODELS`, such as `vitp_1gf` or `vitc_18gf`.
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
    model = MODELS[name](num_classes=num_classes, dtype=dtype, rngs=rngs, **changes)
    model.eval()
    return model
