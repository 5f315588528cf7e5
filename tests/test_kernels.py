"""The kernels for Hopper GPUs: interpreted, and on such a GPU where there is one."""

import re

import jax
import jax.numpy as jnp
import pytest

from convstem_jax.models import attention, kernels, layer_norm_kernels, packed_attention
from convstem_jax.models.gelu import gelu
from tests.forms import FEW_BLOCKS, assert_the_same, choose, logits_gradients_and_statistics

interpreted = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="only the interpreter has the kernels in float32"
)


@interpreted
def test_kernels(monkeypatch):
    """17 tokens are fewer than the queries of a block, and the keys' block has 32."""
    choose(monkeypatch, gpu=False)
    elsewhere = logits_gradients_and_statistics("vitc_tiny")
    calls = []

    def call(*args, **kwargs):
        calls.append(kwargs)
        return by_pallas(*args, **kwargs)

    by_pallas = kernels.call
    choose(monkeypatch, gpu=True)
    monkeypatch.setattr(attention, "choose_form", lambda *_: "packed")
    monkeypatch.setattr(kernels, "are_used", lambda _: True)
    monkeypatch.setattr(kernels, "call", call)
    assert_the_same(logits_gradients_and_statistics("vitc_tiny", num_devices=2), elsewhere)
    # Two norms, GELU and attention, but the last block has attention only for the class token.
    depth = FEW_BLOCKS["vit"]["depth"]
    assert len(calls) == 4 * depth - 1 + 3 * depth - 1, "forward, and gradients"


def attention_and_gradients(attend, num_tokens, shift, dtype=jnp.float32):
    """For random tokens and weights, with biases of `-shift` for queries and `shift` for keys."""
    width = 64
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, num_tokens, width), (width, 3 * width), (3 * width,), (2, num_tokens, width)
    x, kernel, bias, grad = (
        jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    )
    bias = bias.at[: 2 * width].add(jnp.repeat(jnp.array([-shift, shift]), width))
    x, kernel, bias, grad = (y.astype(dtype) for y in (x, kernel * width**-0.5, bias, grad))
    with jax.default_matmul_precision("highest"):
        out, vjp = jax.vjp(attend, x, kernel, bias)
        return out, *vjp(grad)


def attend_by_xla(x, kernel, bias, num_heads=2):
    n, t, _ = x.shape
    qkv = (x @ kernel + bias).reshape(n, t, 3, num_heads, -1)
    q, k, v = jnp.moveaxis(qkv, (2, 1), (0, 4))
    return attention.attend(q, k, v).transpose(0, 3, 1, 2).reshape(n, t, -1)


def attend_by_kernel(*args):
    return packed_attention.project_and_attend(*args, 2)


@interpreted
@pytest.mark.parametrize(
    ("num_tokens", "shift", "tolerance"),
    [(129, 0, 2e-5), (150, 0, 2e-5), (256, 0, 2e-5), (150, 7, 1e-3)],
)
def test_packed_attention_over_several_blocks(monkeypatch, num_tokens, shift, tolerance):
    """Blocks have 32 queries, the last one perhaps fewer. The keys are padded to 256.

    With the shift all scores are near -277, and the exponential of minus their logsumexp, the
    weight of a key that does not exist, is infinite.
    """
    choose(monkeypatch, gpu=True)
    found = attention_and_gradients(attend_by_kernel, num_tokens, shift)
    expected = attention_and_gradients(attend_by_xla, num_tokens, shift)
    for x, y in zip(found, expected, strict=True):
        assert jnp.abs(x - y).max() <= tolerance * jnp.abs(y).max()


@interpreted
def test_packed_attention_in_bfloat16_is_as_near_as_xlas(monkeypatch):
    """The type in which it is used."""
    choose(monkeypatch, gpu=True)
    found, by_xla = (
        attention_and_gradients(attend, 197, 0, jnp.bfloat16)
        for attend in (attend_by_kernel, attend_by_xla)
    )
    exact = attention_and_gradients(attend_by_xla, 197, 0)
    for x, y, z in zip(found, by_xla, exact, strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16
        assert jnp.linalg.norm(x - z) < 1.05 * jnp.linalg.norm(y - z) < 0.02 * jnp.linalg.norm(z)


@interpreted
def test_norm_of_rows_that_fill_no_whole_number_of_programs(monkeypatch):
    """24 columns, of a block's 32, and 15 rows, four to a program."""
    choose(monkeypatch, gpu=True)
    keys = jax.random.split(jax.random.key(0), 3)
    x, *grads = (jax.random.normal(key, (3, 5, 24)) for key in keys)

    def by_xla(x):
        y = x - x.mean(-1, keepdims=True)
        return x, y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    expected, expected_vjp = jax.vjp(by_xla, x)
    found, vjp = jax.vjp(lambda x: layer_norm_kernels.normalize(x, 1e-6), x)
    pairs = (found, expected), (vjp(tuple(grads)), expected_vjp(tuple(grads)))
    for y, z in ((y, z) for pair in pairs for y, z in zip(*pair, strict=True)):
        assert jnp.abs(y - z).max() < 2e-6


@interpreted
def test_kernels_of_several_trials_at_once(monkeypatch):
    choose(monkeypatch, gpu=True)
    monkeypatch.setattr(kernels, "are_used", lambda _: True)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 40, 64))
    kernel, bias = (jax.random.normal(key, (3, *shape, 192)) for key, shape in
                    zip(keys[1:], ((64,), ()), strict=True))  # fmt: skip

    def loss(x, kernel, bias):
        x, y = layer_norm_kernels.normalize(x, 1e-6)
        return jnp.sin(x + gelu(packed_attention.project_and_attend(y, kernel, bias, 2))).sum()

    gradients = jax.grad(loss, (0, 1, 2))
    together = jax.vmap(gradients, (None, 0, 0))(x, kernel, bias)
    for i in range(3):
        for y, z in zip(together, gradients(x, kernel[i], bias[i]), strict=True):
            assert jnp.abs(y[i] - z).max() < 1e-5 * jnp.abs(z).max()


def test_gelus_kernel_counts_what_one_device_has(monkeypatch):
    choose(monkeypatch, gpu=True)
    x = jax.ShapeDtypeStruct((8, 2**28), jnp.bfloat16)
    for num_devices in (1, 8):
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.AbstractMesh((num_devices,), ("data",), axis_types=auto)
        with jax.sharding.use_abstract_mesh(mesh):
            program = str(jax.make_jaxpr(gelu)(x))
        assert ("pallas_call" in program) == (num_devices == 8)


@pytest.mark.parametrize(("gpu", "by_kernel"), [(False, False), (True, False), (True, True)])
def test_gelu(monkeypatch, gpu, by_kernel):
    """The numbers do not fill the last of the kernel's programs."""
    if by_kernel and jax.default_backend() == "gpu":
        pytest.skip("only the interpreter has the kernel in float32")
    choose(monkeypatch, gpu=gpu)
    monkeypatch.setattr(kernels, "are_used", lambda _: by_kernel)
    x = jnp.linspace(-10, 10, 3 * 1234).reshape(3, 1, 1234)
    grad = jax.random.normal(jax.random.key(0), x.shape)
    expected, expected_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), x)
    found, vjp = jax.vjp(gelu, x)
    assert jnp.abs(found - expected).max() < 2e-6
    assert jnp.abs(vjp(grad)[0] - expected_vjp(grad)[0]).max() < 2e-6


def test_kernels_are_used_where_they_can_be_divided(monkeypatch):
    choose(monkeypatch, gpu=True)
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit

    def used(num, **axes):
        mesh = jax.make_mesh((2,) * len(axes), tuple(axes), axis_types=tuple(axes.values()))
        with jax.set_mesh(mesh):
            return kernels.are_used(jnp.zeros((num, 1), jnp.bfloat16))

    assert kernels.are_used(jnp.zeros((3, 1), jnp.bfloat16))
    for millions, is_used in ((0.6, True), (0.7, False)):
        x = jax.ShapeDtypeStruct((int(millions * 2**20), 1000), jnp.bfloat16)
        assert kernels.are_used(x) is is_used, "three times as many numbers fit in 31 bits or not"
    assert used(4, data=auto)
    assert not used(3, data=auto)
    assert not used(4, data=explicit)
    assert not used(4, batch=auto)
    assert not used(4, data=auto, model=auto)


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")
needs_hopper = pytest.mark.skipif(
    not re.match(r"NVIDIA G?H\d", jax.devices()[0].device_kind), reason="no Hopper GPU here"
)


def assert_near(found, exact):
    """What is found in bfloat16 is near what is exact, in float32."""
    for x, y in zip(found, exact, strict=True):
        assert jnp.linalg.norm(x - y) < 0.01 * jnp.linalg.norm(y)


@pytest.mark.parametrize(
    "form", [pytest.param("cudnn", marks=needs_gpu), pytest.param("packed", marks=needs_hopper)]
)
def test_attention_on_a_gpu_is_near_that_in_float32(form):
    n, t, h, d = 4, 197, 3, 64
    qkv = jax.random.normal(jax.random.key(0), (n, t, 3, h, d), jnp.bfloat16)
    grad = jax.random.normal(jax.random.key(1), (n, t, h, d), jnp.bfloat16)

    def cudnn(qkv):
        qkv = jnp.pad(qkv, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
        return attention.attend_fused(*jnp.moveaxis(qkv, 2, 0), num_tokens=t)[:, :t]

    def packed(qkv):
        # The product with the identity is exact.
        out = packed_attention.project_and_attend(
            qkv.reshape(n, t, -1),
            jnp.eye(3 * h * d, dtype=qkv.dtype),
            jnp.zeros(3 * h * d, qkv.dtype),
            h,
        )
        return out.reshape(grad.shape)

    def reference(qkv):
        q, k, v = jnp.moveaxis(qkv, (2, 1), (0, 4))
        return attention.attend(q, k, v).transpose(0, 3, 1, 2)

    found, vjp = jax.vjp(jax.jit(cudnn if form == "cudnn" else packed), qkv)
    with jax.default_matmul_precision("highest"):
        exact, exact_vjp = jax.vjp(reference, qkv.astype(jnp.float32))
        exact_grad = exact_vjp(grad.astype(jnp.float32))[0]
    # Those of queries, keys and values one by one, since they differ in size.
    grads = (jnp.moveaxis(x, 2, 0) for x in (vjp(grad)[0], exact_grad))
    assert_near([found, *next(grads)], [exact, *next(grads)])


@needs_hopper
def test_gelu_and_norm_on_a_gpu_are_near_those_in_float32(monkeypatch):
    choose(monkeypatch, gpu=True)
    keys = jax.random.split(jax.random.key(0), 3)
    x, *grads = (jax.random.normal(key, (5, 197, 192), jnp.bfloat16) for key in keys)
    full = x.astype(jnp.float32), *(grad.astype(jnp.float32) for grad in grads)

    found, vjp = jax.vjp(jax.jit(gelu), x)
    exact, exact_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), full[0])
    assert_near([found, *vjp(grads[0])], [exact, *exact_vjp(full[1])])

    def normalize(x):
        y = x - x.mean(-1, keepdims=True)
        return x, y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)

    found, vjp = jax.vjp(jax.jit(lambda x: layer_norm_kernels.normalize(x, 1e-6)), x)
    exact, exact_vjp = jax.vjp(normalize, full[0])
    assert_near([*found, *vjp(tuple(grads))], [*exact, *exact_vjp(full[1:])])
