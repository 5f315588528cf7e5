"""On GPUs the models and the step take other forms, which compute the same."""

import re

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from convstem_jax import optim, sharding, xla_options
from convstem_jax.config import load_config
from convstem_jax.jaxprs import float32_products
from convstem_jax.models import attention, kernels, target
from convstem_jax.models.regnet import GroupedConv
from convstem_jax.study import programs
from convstem_jax.study.experiments import Population, run_config
from convstem_jax.study.programs import Trial
from tests.forms import (
    NUM_CLASSES,
    assert_the_same,
    choose,
    device_of,
    logits_gradients_and_statistics,
)
from tests.programs import trace


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
    """XLA stands in for cuDNN, for which JAX refuses odd numbers of tokens."""
    numbers = []

    def cudnn(q, *args, implementation, **kwargs):
        assert implementation == "cudnn" and q.shape[1] % 2 == 0
        numbers.append(q.shape[1])
        return by_xla(q, *args, implementation="xla", **kwargs)

    by_xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
    return numbers


def test_fused_attention_of_an_odd_number_of_tokens(monkeypatch, cudnns_numbers_of_tokens):
    """17 tokens are padded to 18."""
    choose(monkeypatch, gpu=False)
    elsewhere = logits_gradients_and_statistics("vitp_tiny")
    choose(monkeypatch, gpu=True)
    monkeypatch.setattr(attention, "choose_form", lambda *_: "cudnn")
    assert_the_same(logits_gradients_and_statistics("vitp_tiny", num_devices=2), elsewhere)
    assert set(cudnns_numbers_of_tokens) == {18}


def test_the_norm_of_a_tree(monkeypatch):
    shapes = [(3,), (1, 5), (1, 1, 4), (2, 3), (2, 2, 3, 4)]
    tree = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    expected = optim.norm(tree)
    assert expected == pytest.approx(sum(float((x**2).sum()) for x in tree) ** 0.5)
    choose(monkeypatch, gpu=True)
    assert optim.norm(tree) == pytest.approx(float(expected))


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


def test_flags_of_the_environment_come_first(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1 --xla_gpu_enable_triton_gemm=true")
    options = xla_options.compiler_options([device_of("NVIDIA H200")])
    assert "xla_gpu_enable_triton_gemm" not in options and "xla_gpu_graph_min_graph_size" in options
    assert xla_options.compiler_options(jax.devices("cpu")) == {}


def test_the_step_is_compiled_with_options_that_xla_knows():
    """JAX refuses options that this version of XLA, the same for all devices, does not know."""
    options = xla_options.compiler_options([device_of("NVIDIA H200")])
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    # A run that starts with a filled cache could fail; see xla_options.py.
    assert "CONVOLUTION" not in options["xla_gpu_enable_command_buffer"].split(",")
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options=options | {"xla_gpu_unheard_of": 1})(1)


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("gpu", "NVIDIA H200", "packed"),
        ("gpu", "NVIDIA H100 80GB HBM3", "packed"),
        ("gpu", "NVIDIA GH200 480GB", "packed"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "cudnn"),
        ("gpu", "NVIDIA B200", "cudnn"),
        ("gpu", "NVIDIA L4", "cudnn"),
        ("gpu", "Tesla T4", "xla"),
        ("gpu", "AMD Instinct MI300X", "xla"),
        ("tpu", "TPU v5 lite", "xla"),
        ("cpu", "cpu", "xla"),
        ("", "", "xla"),
    ],
)
def test_the_forms_are_chosen_by_the_device_that_is_traced_for(
    monkeypatch, platform, kind, expected
):
    monkeypatch.setattr(target, "device", lambda: device_of(kind, platform))
    if not kind.startswith("NVIDIA"):  # A program for other devices must not open any here.
        monkeypatch.delattr(jax, "local_devices")
    assert [target.on_cpu(), target.on_gpu(), target.on_tpu()] == [
        platform == name for name in ("cpu", "gpu", "tpu")
    ]
    # On GPUs cuDNN and its like convolve; elsewhere each group is a product, or all are merged.
    conv = GroupedConv(32, 8, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    program = jax.make_jaxpr(conv)(jnp.zeros((2, 8, 8, 32)))
    assert ("feature_group_count=4" in str(program)) == (platform == "gpu")

    def form(num_tokens, head_width, dtype=jnp.bfloat16):
        return attention.choose_form(jnp.zeros((2, 1, 1), dtype), num_tokens, head_width)

    assert form(197, 64, jnp.float32) == form(17, 32, jnp.float32) == "xla"
    by_xla_or_cudnn = "xla" if expected == "xla" else "cudnn"
    assert {form(17, 32), form(197, 32), form(128, 64), form(257, 64)} == {by_xla_or_cudnn}
    assert form(129, 64) == form(197, 64) == form(256, 64) == expected
    monkeypatch.setattr(kernels, "triton", None)
    assert form(197, 64) == by_xla_or_cudnn


@pytest.mark.usefixtures("shallow")
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
