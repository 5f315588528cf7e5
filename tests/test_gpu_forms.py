"""What the models and the step do in another form on GPUs: the same."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from convstem_jax import sharding, xla_options
from convstem_jax.complexity import float32_products
from convstem_jax.config import load_config
from convstem_jax.models import (
    MODELS,
    attention,
    create_model,
    kernels,
    layer_norm_kernels,
    packed_attention,
    target,
)
from convstem_jax.models.gelu import gelu
from convstem_jax.study import programs
from convstem_jax.study.experiments import Population, run_config
from convstem_jax.study.programs import Trial
from tests.test_program import trace

NUM_CLASSES = 5


def logits_gradients_and_statistics(name, num_devices=1, dtype=jnp.float32):
    """Of a model with random parameters."""
    mesh = sharding.Sharding(jax.devices()[:num_devices])
    model = create_model(name, num_classes=NUM_CLASSES, dtype=dtype, rngs=nnx.Rngs(0))
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


def choose(monkeypatch, gpu):
    """Which forms are taken, whatever device is here."""
    monkeypatch.setattr(target, "device_kind", lambda: "NVIDIA H200" if gpu else "")


def assert_the_same(found, expected):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        # Zero, but for rounding, of a bias before BatchNorm and of the keys' bias.
        floor = 1e-4 if "bias" in jax.tree_util.keystr(path) else 0
        assert jnp.abs(x - y).max() <= 2e-5 * jnp.abs(y).max() + floor, path


@pytest.mark.parametrize("name", ["vitc_tiny", "vitp_tiny", "vitp_tiny_bn", "vitc_tiny_ln"])
def test_norms_and_first_convolution(monkeypatch, name):
    choose(monkeypatch, gpu=False)
    elsewhere = logits_gradients_and_statistics(name)
    kernels = []

    def record(x, kernel, *args, **kwargs):
        kernels.append(kernel.shape[:3])
        return by_xla(x, kernel, *args, **kwargs)

    by_xla = jax.lax.conv_general_dilated
    monkeypatch.setattr(jax.lax, "conv_general_dilated", record)
    choose(monkeypatch, gpu=True)
    assert_the_same(logits_gradients_and_statistics(name, num_devices=2), elsewhere)
    assert ((2, 2, 16) in kernels) == name.startswith("vitc")


def test_regnet(monkeypatch):
    choose(monkeypatch, gpu=False)
    elsewhere = logits_gradients_and_statistics("regnety_tiny")
    choose(monkeypatch, gpu=True)
    assert_the_same(logits_gradients_and_statistics("regnety_tiny", num_devices=2), elsewhere)


@pytest.fixture
def cudnns_numbers_of_tokens(monkeypatch):
    """XLA stands in for cuDNN, of which JAX refuses odd numbers of tokens."""
    numbers = []

    def cudnn(q, *args, implementation, **kwargs):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        numbers.append(q.shape[1])
        return by_xla(q, *args, implementation="xla", **kwargs)

    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return numbers


@pytest.mark.parametrize("name", ["vitc_tiny", "vitp_tiny"])
def test_fused_attention_of_an_odd_number_of_tokens(monkeypatch, name, cudnns_numbers_of_tokens):
    """17 tokens are filled up to 18."""
    choose(monkeypatch, gpu=False)
    elsewhere = logits_gradients_and_statistics(name)
    choose(monkeypatch, gpu=True)
    monkeypatch.setattr(attention, "form", lambda *_: "cudnn")
    assert_the_same(logits_gradients_and_statistics(name, num_devices=2), elsewhere)
    assert set(cudnns_numbers_of_tokens) == {18}


interpreted = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="only the interpreter has the kernels in float32"
)


@interpreted
@pytest.mark.parametrize("name", ["vitc_tiny", "vitp_tiny"])
def test_kernels(monkeypatch, name):
    """17 tokens are fewer than the queries of a block, and the keys' block has 32."""
    choose(monkeypatch, gpu=False)
    elsewhere = logits_gradients_and_statistics(name)
    calls = []

    def call(*args, **kwargs):
        calls.append(kwargs)
        return by_pallas(*args, **kwargs)

    by_pallas = kernels.call
    choose(monkeypatch, gpu=True)
    monkeypatch.setattr(attention, "form", lambda *_: "packed")
    monkeypatch.setattr(kernels, "are_used", lambda _: True)
    monkeypatch.setattr(kernels, "call", call)
    assert_the_same(logits_gradients_and_statistics(name, num_devices=2), elsewhere)
    # Two norms, GELU and attention, but the last block has attention for the class token alone.
    forward, gradients = 4 * MODELS[name].depth - 1, 3 * MODELS[name].depth - 1
    assert len(calls) == forward + gradients


@interpreted
def test_packed_attention_over_several_blocks_of_queries():
    """150 tokens: the last block has fewer queries than the others, and the keys are filled up."""
    n, t, h, d = 2, 150, 2, 32
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (n, t, h * d), (h * d, 3 * h * d), (3 * h * d,), (n, t, h * d)
    *args, grad = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    args[1] *= (h * d) ** -0.5

    def reference(x, kernel, bias):
        q, k, v = jnp.moveaxis((x @ kernel + bias).reshape(n, t, 3, h, d), (2, 1), (0, 4))
        return attention.attend(q, k, v).transpose(0, 3, 1, 2).reshape(n, t, h * d)

    with jax.default_matmul_precision("highest"):
        expected, expected_vjp = jax.vjp(reference, *args)
        found, vjp = jax.vjp(lambda *args: packed_attention.project_and_attend(*args, h), *args)
        pairs = zip((found, *vjp(grad)), (expected, *expected_vjp(grad)), strict=True)
    for x, y in pairs:
        assert jnp.abs(x - y).max() <= 2e-5 * jnp.abs(y).max()


@pytest.mark.parametrize(("gpu", "by_kernel"), [(False, False), (True, False), (True, True)])
def test_gelu(monkeypatch, gpu, by_kernel):
    """Of numbers that fill no whole number of the kernel's programs."""
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


def test_all_forms_in_bfloat16(monkeypatch, cudnns_numbers_of_tokens):
    """Together they are no farther from float32 than the forms of CPUs."""
    choose(monkeypatch, gpu=False)
    exact = jax.tree.leaves(logits_gradients_and_statistics("vitc_tiny"))
    errors = []
    for gpu in (False, True):
        choose(monkeypatch, gpu=gpu)
        found = logits_gradients_and_statistics("vitc_tiny", num_devices=2, dtype=jnp.bfloat16)
        found = zip(jax.tree.leaves(found), exact, strict=True)
        square = sum(float(jnp.sum((x.astype(jnp.float32) - y) ** 2)) for x, y in found)
        errors.append((square / sum(float(jnp.sum(y**2)) for y in exact)) ** 0.5)
    assert 1e-3 < errors[1] < 1.3 * errors[0] < 0.1
    assert cudnns_numbers_of_tokens


needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU here")


def assert_near(found, exact):
    """bfloat16 and float32."""
    for x, y in zip(found, exact, strict=True):
        assert jnp.linalg.norm(x - y) < 0.01 * jnp.linalg.norm(y)


@needs_gpu
@pytest.mark.parametrize("form", ["cudnn", "packed"])
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
    # Of queries, keys and values one by one: they differ in size.
    grads = (jnp.moveaxis(x, 2, 0) for x in (vjp(grad)[0], exact_grad))
    assert_near([found, *next(grads)], [exact, *next(grads)])


@needs_gpu
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


def test_flags_of_the_environment_come_first(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1 --xla_gpu_enable_triton_gemm=true")
    options = xla_options.compiler_options([GpuDevice])
    assert "xla_gpu_enable_triton_gemm" not in options and "xla_gpu_graph_min_graph_size" in options
    assert xla_options.compiler_options(jax.devices("cpu")) == {}


def test_the_step_is_compiled_with_options_that_xla_knows():
    """JAX refuses what this version of XLA, which is the same for all devices, does not know."""
    options = xla_options.compiler_options([GpuDevice])
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_gpu_unheard_of": 1})(1)


class GpuDevice:
    device_kind = "NVIDIA H200"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("NVIDIA H200", True), ("TPU v5 lite", False), ("Tesla T4", False), ("", False)],
)
def test_the_forms_are_chosen_by_the_device_that_is_traced_for(monkeypatch, kind, expected):
    monkeypatch.setattr(target, "device_kind", lambda: kind)
    if not expected:  # A program for other devices takes hold of none.
        monkeypatch.delattr(jax, "local_devices")
    assert target.on_gpu() == expected
    assert attention.form(jnp.float32, 197, 64) == attention.form(jnp.float32, 17, 32) == "own"
    assert attention.form(jnp.bfloat16, 17, 32) == ("cudnn" if expected else "own")
    assert attention.form(jnp.bfloat16, 197, 64) == ("packed" if expected else "own")


def test_steps_are_compiled_with_the_options(monkeypatch):
    given = []

    def jit(function, *args, compiler_options=None, **kwargs):
        given.append(compiler_options)
        return by_jax(function, *args, compiler_options=compiler_options, **kwargs)

    by_jax = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    options = {"xla_backend_optimization_level": 1}
    for module in (sharding, programs):
        monkeypatch.setattr(module, "compiler_options", lambda devices: options)
    sharding.Sharding(jax.devices()[:1]).jit(lambda x: x + 1)
    assert given == [options]
    config = load_config("configs/study.py")
    trials = (Trial(0.1, 1e-4, 0),)
    config = run_config(config, Population("seeds", "vitp_tiny", "sgd", 3.0, trials))
    given.clear()
    programs.Programs(config, NUM_CLASSES, 1, devices=jax.devices()[:1], memory=1e12)
    # The initialisation runs once: on CPUs it has an option of its own.
    assert given.count(options) == 3


def test_beside_the_head_only_norms_biases_multiply_in_float32(monkeypatch):
    choose(monkeypatch, gpu=True)

    def cudnn(q, k, v, **_):
        q, k, v = (x.transpose(0, 2, 3, 1) for x in (q, k, v))
        return attention.attend(q, k, v).transpose(0, 3, 1, 2)

    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    traced, _ = trace("vitp_1gf", "adamw", sharding.Sharding(jax.devices()[:1]))
    found = float32_products(traced.jaxpr.jaxpr)
    of_head = [types for types in found if "1000" in types]
    assert len(of_head) == 3
    # A vector and a matrix, or two vectors for the gradient of the matrix.
    assert all(re.search(r"float32\[\d+\]", types) for types in found.keys() - of_head)
    assert len(found) > 3
