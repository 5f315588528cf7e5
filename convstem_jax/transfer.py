"""Starts one model from the weights of another, with another image size or other classes."""

import math

from flax import traverse_util
import jax
import jax.numpy as jnp
from tabulate import tabulate

from convstem_jax.errors import CheckpointError
from convstem_jax.weights import Weights


def transfer(old: Weights, new: Weights, *, same_classes: bool = True) -> tuple[Weights, str]:
    """Puts the weights of one model into another of the same architecture.

    A position embedding for another image size is resized bicubically, except for the class
    token's; a head for other classes stays new.

    Args:
        old: weights to take.
        new: weights of the new model, freshly drawn.
        same_classes: whether the classes are the same ones where there are as many.

    Returns:
        The new model's weights, and a table of what was not simply taken.

    Raises:
        CheckpointError: naming arrays that do not fit.
    """
    old, new = (traverse_util.flatten_dict(tree) for tree in (old, new))
    result, lines, wrong = {}, [], []
    for path in sorted(old.keys() | new.keys(), key=str):
        name = "/".join(map(str, path[1:]))
        shapes = [tree[path].shape if path in tree else "–" for tree in (old, new)]
        is_new_head = path[1] == "head" and not (same_classes and shapes[0] == shapes[1])
        if shapes[0] == shapes[1] and not is_new_head:
            result[path] = old[path]
        elif is_new_head and "–" not in shapes and shapes[0][:-1] == shapes[1][:-1]:
            result[path] = new[path]
            lines.append([name, *shapes, "new: other classes"])
        elif path[1] == "position_embedding" and shapes[0][-1] == shapes[1][-1]:
            result[path] = resize_position_embedding(old[path], new[path].shape[1])
            lines.append([name, *shapes, "resized"])
        else:
            wrong.append(f"{name}: {shapes[0]} there, {shapes[1]} here")
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} arrays belong to another architecture, such as\n  "
            + "\n  ".join(wrong[:5])
        )
    lines.append([f"the other {len(result) - len(lines)}", "", "", "loaded"])
    table = tabulate(lines, ["array", "there", "here", ""], disable_numparse=True)
    return {"batch_stats": {}} | traverse_util.unflatten_dict(result), table


def resize_position_embedding(embedding: jax.Array, num_tokens: int) -> jax.Array:
    """Resizes a position embedding `[1, 1 + side^2, d]` to `num_tokens`, bicubically.

    With anti-aliasing where it gets smaller, and a = -0.5, as in Pillow.
    """
    class_token, grid = embedding[:, :1], embedding[:, 1:]
    old, new = math.isqrt(grid.shape[1]), math.isqrt(num_tokens - 1)
    d = grid.shape[-1]
    grid = jax.image.resize(jnp.reshape(grid, (1, old, old, d)), (1, new, new, d), "bicubic")
    return jnp.concatenate([class_token, grid.reshape(1, new * new, d)], axis=1)
