"""What the compiled training step does not do: what would cost speed on every device."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest

from convstem_jax import train as train_module
from convstem_jax.config import load_config, set_field
from convstem_jax.jaxprs import float32_products, inner_programs
from convstem_jax.sharding import Sharding
from tests.programs import trace


@pytest.mark.parametrize("name", ["vitc_18gf", "vitp_1gf", "regnety_4gf"])
def test_only_the_head_multiplies_in_float32(name):
    """Its forward product and two gradients; see `ViT.head`."""
    traced, state = trace(name, "adamw", Sharding(jax.devices()[:1]))
    found = float32_products(traced.jaxpr.jaxpr)
    kernel = list(state.params["head"]["kernel"].shape)
    assert sum(found.values()) == 3
    assert all(str(kernel) in types or "[16, 1000]" in types for types in found)


@pytest.mark.parametrize("name", ["vitc_tiny", "vitp_tiny", "regnety_tiny"])
def test_sums_are_in_float32(name):
    """Those of parameters' gradients too, which Flax's layers round to bfloat16 in between."""
    traced, _ = trace(name, "adamw", Sharding(jax.devices()[:1]))
    sums = [eqn for eqn in equations(traced.jaxpr.jaxpr) if eqn.primitive.name == "reduce_sum"]
    sums = [eqn for eqn in sums if eqn.invars[0].aval.size > eqn.outvars[0].aval.size]
    assert len(sums) > 20
    assert not [str(eqn) for eqn in sums if eqn.invars[0].aval.dtype == jnp.bfloat16]


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_programs(eqn):
            yield from equations(inner)


@pytest.mark.parametrize("name", ["vitc_tiny", "regnety_tiny"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_nothing_calls_the_host(name, optimizer):
    traced, _ = trace(name, optimizer, Sharding(jax.devices()[:1]))
    names = {eqn.primitive.name for eqn in equations(traced.jaxpr.jaxpr)}
    assert not [x for x in names if re.search("callback|infeed|outfeed|print|device_put", x)]


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("state_sharding, optimizer", [("replicated", "adamw"), ("fsdp", "sgd")])
def test_the_whole_state_is_updated_in_place(state_sharding, optimizer):
    sharding = Sharding(jax.devices()[:2], state_sharding)
    traced, state = trace("vitc_tiny", optimizer, sharding)
    compiled = traced.lower().compile()
    on_device = sum(
        x.dtype.itemsize * int(jnp.prod(jnp.array(x.sharding.shard_shape(x.shape))))
        for x in jax.tree.leaves(state)
    )
    assert compiled.memory_analysis().alias_size_in_bytes == on_device
    header = compiled.as_text().partition("\n")[0]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", header)[1]
    assert aliases.count("alias)") == len(jax.tree.leaves(state))


def lowered_in(caplog, tmp_path, epochs):
    """How often a whole run with evaluations and checkpoints lowers a program of ours."""
    config = load_config("configs/quickstart.py")
    fields = {"epochs": epochs, "eval_every_epochs": 0.02, "checkpoint_every_steps": 3}
    fields |= {"warmup_epochs": 0.01, "log_every_steps": 2, "eval_split": "test[:250]"}
    fields |= {"precise_bn_examples": 128}
    for name, value in fields.items():
        set_field(config, name, str(value))
    caplog.clear()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        train_module.train(config, str(tmp_path / f"run{epochs}"))
    lowered = "Finished jaxpr to MLIR module conversion jit"
    lowered += r"\((train_step|eval_step|batch_statistics)\)"
    return sum(bool(re.search(lowered, record.getMessage())) for record in caplog.records)


@pytest.mark.usefixtures("shallow")
def test_a_longer_run_compiles_nothing_more(caplog, tmp_path, train_on):
    train_on(2)
    short, long = (lowered_in(caplog, tmp_path, epochs) for epochs in (0.04, 0.12))
    assert long == short == 3, "the step, the evaluation, the statistics"
