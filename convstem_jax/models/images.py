"""The images that every network takes."""

import jax
import jax.numpy as jnp


def check_images(images: jax.Array, size: int | None = None) -> None:
    """Checks that images are `[N, H, W, 3]` and floating; `size`, if given, is H and W.

    Raises:
        ValueError: they are not.
    """
    is_wrong_size = size is not None and images.shape[1:3] != (size, size)
    if images.ndim != 4 or images.shape[3] != 3 or is_wrong_size:
        height, width = (size, size) if size else ("H", "W")
        raise ValueError(f"images are {images.shape}; this model takes [N, {height}, {width}, 3]")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}: normalise them (convstem_jax.predict.prepare)"
        )
