"""Networks for tests: ours with random weights, and torchvision's of the same architecture."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_contenders
from convstem_jax import layouts
from convstem_jax.models import create_model
from convstem_jax.step import split_model


def abstract(name, **kwargs):
    """A model of shapes, without arrays."""
    return nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **kwargs))


def random_model(name, **kwargs):
    """A model whose every parameter and statistic is random: zeros and ones hide mistakes."""
    model, rng = abstract(name, **kwargs), np.random.default_rng(0)

    def new(path, x):
        noise = rng.normal(size=x.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return jnp.array(1.5 * noise / np.sqrt(math.prod(x.shape[:-1]), dtype=np.float32))
        if path[-1].key in ("scale", "var"):
            return jnp.array(1 + 0.5 * np.tanh(noise))
        return jnp.array(0.3 * noise)

    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    nnx.update(model, jax.tree.map_with_path(new, state))
    return model


def images_of(n, size, seed=1):
    return np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)


def torchvision_network(model):
    """torchvision's network of the same architecture, with the weights of `model`."""
    network = torch_contenders.torchvision_network(model.spec, model.head.out_features)
    _, params, batch_stats = split_model(model)
    if all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
        state = layouts.to_torch({"params": params, "batch_stats": batch_stats}, "torchvision")
        network.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    return network.eval()
