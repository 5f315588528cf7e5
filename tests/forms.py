"""Chooses the form of the models, whatever device is here, and computes with it."""

from flax import nnx
import jax
import jax.numpy as jnp

from convstem_jax import sharding
from convstem_jax.models import create_model, kernels, target

NUM_CLASSES = 5
# Two blocks, since the last one differs; in a RegNet one block a stage.
FEW_BLOCKS = {"vit": {"depth": 2}, "reg": {"depths": (1, 1, 1)}}


def logits_gradients_and_statistics(name, num_devices=1, dtype=jnp.float32):
    """Those of a model with random parameters."""
    mesh = sharding.Sharding(jax.devices()[:num_devices])
    model = create_model(
        name, num_classes=NUM_CLASSES, dtype=dtype, rngs=nnx.Rngs(0), **FEW_BLOCKS[name[:3]]
    )
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), params)
    images = jax.device_put(jax.random.normal(next(keys), (4, 32, 32, 3)), mesh.batch)
    weights = jax.random.normal(next(keys), (4, NUM_CLASSES))

    def loss(params, images):
        model = nnx.merge(graphdef, params, batch_stats)
        model.train()
        logits = model(images)
        return (weights * logits).sum(), (logits, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    with jax.default_matmul_precision("highest"):
        grads, others = mesh.jit(jax.grad(loss, has_aux=True))(params, images)
    return jax.device_get({"gradients": grads, "others": others})


def device_of(kind, platform="gpu"):
    """A device as a mesh describes it."""
    return jax.sharding.AbstractDevice(kind, num_cores=None, platform=platform)


def choose(monkeypatch, gpu):
    """Makes models take the forms of GPUs or those of no known device, whatever device is here."""
    device = device_of("NVIDIA H200") if gpu else device_of("", "")
    monkeypatch.setattr(target, "device", lambda: device)
    monkeypatch.setattr(kernels, "INTERPRET", jax.default_backend() == "cpu")


def assert_the_same(found, expected):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        # But for rounding, the gradient of a bias before BatchNorm and of the keys' bias is zero.
        floor = 1e-4 if "bias" in jax.tree_util.keystr(path) else 0
        assert jnp.abs(x - y).max() <= 2e-5 * jnp.abs(y).max() + floor, path
