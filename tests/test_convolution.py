"""Convolutions on CPUs as products of matrices: the same function, and where they are used."""

import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convstem_jax.models import convolution, create_model
from convstem_jax.models.convolution import convolve
from convstem_jax.sharding import Sharding


def told(function, num_devices=1):
    """`function` under a mesh of CPUs."""
    return Sharding(jax.devices("cpu")[:num_devices]).jit(lambda *args: function(*args))


def new_conv(num_in, num_out, size, stride, pad, **kwargs):
    padding = ((pad, pad), (pad, pad)) if pad else "VALID"
    bias = nnx.initializers.normal()
    kwargs |= {"strides": stride, "padding": padding, "bias_init": bias, "rngs": nnx.Rngs(0)}
    return nnx.Conv(num_in, num_out, (size, size), param_dtype=jnp.float64, **kwargs)


@pytest.mark.parametrize(
    ("num_in", "num_out", "size", "stride", "pad", "num_groups"),
    [
        (3, 4, 3, 2, 1, 1),  # first of a stem
        (4, 6, 3, 1, 1, 1),
        (4, 6, 2, 2, 0, 1),  # S1's last
        (5, 3, 1, 1, 0, 1),
        (5, 3, 1, 2, 0, 1),  # RegNet's shortcut
        (6, 6, 3, 2, 1, 3),  # and its groups
        (8, 4, 3, 1, 1, 2),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 9)])
@pytest.mark.parametrize("use_bias", [False, True])
def test_a_product_is_the_convolution(
    num_in, num_out, size, stride, pad, num_groups, height, width, use_bias
):
    with jax.enable_x64(True):
        conv = new_conv(
            num_in, num_out, size, stride, pad, use_bias=use_bias, feature_group_count=num_groups
        )
        graphdef, params = nnx.split(conv)
        x = jax.random.normal(jax.random.key(1), (4, height, width, num_in), jnp.float64)

        def outputs(params, x, apply=convolve):
            y, vjp = jax.vjp(lambda params, x: apply(nnx.merge(graphdef, params), x), params, x)
            return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

        told_of_none = str(jax.make_jaxpr(outputs)(params, x))
        assert ("conv_general" in told_of_none) == (num_groups == 1)
        by_flax = functools.partial(outputs, apply=lambda conv, x: conv(x))
        expected = jax.tree.leaves(jax.jit(by_flax)(params, x))
        for num_devices in (1, 2):
            sharding = Sharding(jax.devices("cpu")[:num_devices])
            given = jax.device_put(params, sharding.replicated), jax.device_put(x, sharding.batch)
            compiled = sharding.jit(outputs).lower(*given).compile()
            assert not re.search(" convolution|all-gather", compiled.as_text())
            for a, b in zip(jax.tree.leaves(compiled(*given)), expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_left_to_xla_but_for_groups():
    x = jnp.ones((2, 8, 8, 4))
    for num_groups in (1, 2):
        conv = nnx.Conv(
            4, 4, (3, 3), padding=((1, 1), (1, 1)), feature_group_count=num_groups,
            dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )  # fmt: skip
        layer = told(lambda x, conv=conv: convolve(conv, x))
        assert ("conv_general" in str(jax.make_jaxpr(layer)(x))) == (num_groups == 1)
        assert layer(x).dtype == jnp.bfloat16
        np.testing.assert_allclose(layer(x).astype(float), conv(x).astype(float), atol=0.02)


def test_patches_that_would_take_too_much_memory_are_not_made(monkeypatch):
    conv = nnx.Conv(3, 4, (3, 3), padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0))
    x = jnp.ones((2, 8, 8, 3))
    num_patches = 2 * 8 * 8 * 9 * 3
    for limit, is_convolved in (num_patches, False), (num_patches - 1, True):
        monkeypatch.setattr(convolution, "MAX_PATCHES", limit)
        program = str(jax.make_jaxpr(told(lambda x: convolve(conv, x)))(x))
        assert ("conv_general" in program) == is_convolved


@pytest.mark.parametrize("name", ["vitc_tiny", "vitc_tiny_ln", "vitc_tiny_s2", "regnety_tiny"])
def test_networks(name):
    model = create_model(name, num_classes=5, rngs=nnx.Rngs(0))
    # ViT's head is zero at the start.
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape)
    images = jax.random.normal(jax.random.key(2), (4, 32, 32, 3))
    found, expected = jax.jit(told(model))(images), jax.jit(model)(images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * jnp.abs(expected).max())
    # S2 ends in patches of 4x4, side by side.
    num = str(jax.make_jaxpr(told(model))(images)).count("conv_general_dilated[")
    assert num == (name == "vitc_tiny_s2")
