"""The stem on strips of the images: where it is used, and that it is the same function."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from convstem_jax.models import MODELS, strips
from convstem_jax.models.stems import ConvStem
from convstem_jax.sharding import Sharding


def new_stem(name, dtype=jnp.float32):
    spec = MODELS[name]
    kernels = spec.stem_kernels or (3,) * len(spec.stem_channels)
    shape = kernels, spec.stem_channels, spec.stem_strides, spec.width
    return ConvStem(*shape, norm=spec.stem_norm or "batch", dtype=dtype, rngs=nnx.Rngs(0))


def plan(name, num_images, num_devices=8):
    """For so many images on each device."""
    size = MODELS[name].image_size
    images = jax.ShapeDtypeStruct((num_images * num_devices, size, size, 3), jnp.float32)
    convs = nnx.eval_shape(lambda: new_stem(name)).convs
    with jax.sharding.use_abstract_mesh(Sharding(jax.devices()[:num_devices]).mesh.abstract_mesh):
        return strips.plan(convs, images)


def test_images_are_cut_where_that_pays(monkeypatch):
    whole = 1, 0
    assert plan("vitc_1gf", 32) == whole  # not on CPUs
    monkeypatch.setattr(strips, "on_tpu", lambda: True)
    plans = {1: whole, 15: whole, 16: (8, 2), 20: (4, 3), 32: (4, 3), 33: whole, 512: whole}
    for num_images, expected in plans.items():
        assert plan("vitc_1gf", num_images) == expected
        assert plan("vitc_1gf", num_images, num_devices=1) == expected
    assert plan("vitc_18gf", 32) == whole
    assert plan("vitc_4gf_s3", 32) == plan("vitc_4gf_s4", 32) == whole
    images = jax.ShapeDtypeStruct((32, 224, 224, 3), jnp.float32)
    convs = nnx.eval_shape(lambda: new_stem("vitc_1gf")).convs
    assert strips.plan(convs, images) == whole  # no mesh tells of devices


# In float64: ReLU lets rounding decide which gradients pass.
def test_a_stem_on_strips_is_the_same(monkeypatch):
    def outputs(num_devices):
        """Output, batch statistics and gradients, the batch sharded."""
        sharding = Sharding(jax.devices()[:num_devices])
        graphdef, state = nnx.split(new_stem("vitc_1gf", jnp.float64))
        state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
        images = jax.random.normal(jax.random.key(0), (4, 64, 64, 3), jnp.float64)

        def loss(state, images):
            model = nnx.merge(graphdef, state)
            out = model(images)
            return jnp.cos(out).sum(), (out, nnx.state(model, nnx.BatchStat))

        def gradients(state, images):
            return jax.grad(loss, argnums=(0, 1), has_aux=True)(state, images)

        images = jax.device_put(images, sharding.batch)
        state = jax.device_put(state, sharding.replicated)
        return jax.device_get(jax.tree.leaves(sharding.jit(gradients)(state, images)))

    with jax.enable_x64(True):
        whole = outputs(1)
        for num_devices, plan in (1, (4, 3)), (2, (8, 2)):
            monkeypatch.setattr(strips, "plan", lambda *_, plan=plan: plan)
            for strip, expected in zip(outputs(num_devices), whole, strict=True):
                assert strip.shape == expected.shape
                assert np.abs(strip - expected).max() <= 1e-9 * np.abs(expected).max()


def test_devices_send_each_other_no_part_of_the_batch():
    sharding = Sharding(jax.devices()[:2])
    conv = new_stem("vitc_1gf").convs[0]
    images = jnp.ones((4, 64, 64, 3), device=sharding.batch)

    def layer(images):
        return strips.join(strips.convolve(conv, strips.cut(images, 8), 8), 8)

    program = sharding.jit(layer).lower(images).compile().as_text()
    assert "convolution" in program and not re.search("all-|permute|reduce-scatter", program)
