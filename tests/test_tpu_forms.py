"""On TPUs the models take other forms: they compute the same, and compile in a population too."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from convstem_jax.models import MODELS, attention, create_model, regnet, target
from tests.marks import needs_libtpu


@pytest.mark.parametrize(
    ("version", "dies"), [("0.0.42.1", True), ("0.0.50.1", False), ("0.1", False), (None, True)]
)
def test_old_compilers_are_spared_the_fused_gradients(monkeypatch, version, dies):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    monkeypatch.setattr(target, "_libtpu", target._libtpu.__wrapped__)
    for kind, expected in (("TPU v6 lite", dies), ("TPU v5 lite", False)):
        device = jax.sharding.AbstractDevice(kind, num_cores=None, platform="tpu")
        monkeypatch.setattr(target, "device", lambda device=device: device)
        assert target.overflows_in_fused_gradients() == expected


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


@pytest.mark.parametrize("offset", [0, 2])  # added to the values; the gradient subtracts it again
@pytest.mark.parametrize("on_tpu", [False, True])
def test_attention_in_bfloat16_is_near_that_in_float32(monkeypatch, on_tpu, offset):
    exact = attend_gradients(jnp.float32, offset)
    monkeypatch.setattr(attention, "on_tpu", lambda: on_tpu)
    for half, full in zip(attend_gradients(jnp.bfloat16, offset), exact, strict=True):
        assert jnp.linalg.norm(half - full) < 0.012 * jnp.linalg.norm(full)


POPULATION = """
import dataclasses, sys
from convstem_jax import hlo, tpu
from convstem_jax.config import load_config
from convstem_jax.models import MODELS
from convstem_jax.study.experiments import Population, run_config
from convstem_jax.study.programs import Programs, Trial

SMALL = {"vitc_tiny": {"depth": 1}, "regnety_tiny": {"depths": (1, 1), "widths": (32, 64)}}
devices = tpu.open_slice("v5e:2x2").devices
for name in sys.argv[1:]:
    MODELS[name] = dataclasses.replace(MODELS[name], **SMALL[name])
    config = load_config("configs/study.py:dtype=bfloat16")
    config = run_config(config, Population("seeds", name, "sgd", 3.0, (Trial(0.1, 1e-4, 0),)))
    programs = Programs(config, 10, 2, devices=devices, memory=12e9)
    program = hlo.read_program(programs.step.as_text())
    print(name, programs.num_trials, program.cycles > 0, len(program.collectives))
"""


@needs_libtpu
def test_a_population_compiles_for_tpus():
    """With the layouts pinned under the map over trials, which send each other nothing."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parent.parent
    names = ["vitc_tiny"]
    if "DRILL" in os.environ:
        names.append("regnety_tiny")
    else:
        env["JAX_EXEC_TIME_OPTIMIZATION_EFFORT"] = "-1"
    command = [sys.executable, "-c", POPULATION, *names]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    expected = [f"{name} 8 True 0" for name in names]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("platform", "kind"), [("tpu", "TPU v6 lite"), ("gpu", "NVIDIA H200"), ("cpu", "cpu")]
)
@pytest.mark.parametrize("name", ["vitc_1gf", "regnety_tiny"])
def test_a_mesh_that_is_not_ours_will_do(name, platform, kind):
    """`jax.make_mesh` makes the axis explicit; a batch need not be sharded along it."""
    size = MODELS[name].image_size
    images = jax.ShapeDtypeStruct((32, size, size, 3), jnp.float32)

    def logits(images):
        return create_model(name, num_classes=10, rngs=nnx.Rngs(0))(images)

    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,),
        abstract_device=jax.sharding.AbstractDevice(kind, None, platform),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh):
        assert jax.eval_shape(logits, images).shape == (32, 10)
