"""What the models compute in another form on TPUs is the same, here in float32 on the CPU."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from convstem_jax.models import attention, regnet


@pytest.mark.parametrize(
    ("width", "group_width", "merged"), [(24, 4, 6), (120, 4, 30), (384, 32, 4), (320, 20, 1)]
)
def test_merged_groups_are_the_same_convolution(monkeypatch, width, group_width, merged):
    conv = regnet.GroupedConv(width, group_width, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert regnet._groups_to_merge(conv.num_groups, group_width) == merged
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, width))

    graphdef, state = nnx.split(conv)

    def run():
        out, vjp = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return jax.tree.leaves((out, vjp(jax.random.normal(jax.random.key(2), out.shape))))

    elsewhere = run()
    monkeypatch.setattr(regnet, "on_tpu", lambda: True)
    for a, b in zip(run(), elsewhere, strict=True):
        assert jnp.abs(a - b).max() < 1e-5 * jnp.abs(b).max()


def test_inner_products_are_the_same(monkeypatch):
    x, y = (jax.random.normal(jax.random.key(i), (2, 3, 8, 5)) for i in range(2))
    elsewhere = attention._inner_product(x, y)
    assert elsewhere.shape == (2, 3, 1, 5)
    monkeypatch.setattr(attention, "on_tpu", lambda: True)
    assert jnp.abs(attention._inner_product(x, y) - elsewhere).max() < 1e-5


def attend_gradients(dtype, offset):
    arrays = [jax.random.normal(jax.random.key(i), (4, 3, 64, 50)) for i in range(4)]
    q, k, v, grad = (x.astype(dtype) for x in (*arrays[:2], arrays[2] + offset, arrays[3]))
    return [x.astype(jnp.float32) for x in jax.vjp(attention.attend, q, k, v)[1](grad)]


@pytest.mark.parametrize("offset", [0, 2])  # of the values, which the gradient takes off again
@pytest.mark.parametrize("on_tpu", [False, True])
def test_attention_in_bfloat16_is_near_that_in_float32(monkeypatch, on_tpu, offset):
    exact = attend_gradients(jnp.float32, offset)
    monkeypatch.setattr(attention, "in_order", lambda x: x)
    monkeypatch.setattr(attention, "on_tpu", lambda: on_tpu)
    for half, full in zip(attend_gradients(jnp.bfloat16, offset), exact, strict=True):
        assert jnp.linalg.norm(half - full) < 0.012 * jnp.linalg.norm(full)
