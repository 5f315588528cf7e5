"""The paper's training step as a program."""

import jax

from benchmarks import jax_contenders
from benchmarks.workload import recipe_of
from convstem_jax import build

ARRAYS = jax.ShapeDtypeStruct


def trace(name, optimizer, sharding, batch=16):
    """The paper's step in bfloat16, and the state that it takes."""
    recipe = recipe_of(optimizer)
    new = jax_contenders.new_model("convstem_jax", name)
    graphdef, state = jax_contenders.abstract_state(new, recipe)
    shardings = sharding.of_state(state)
    state = jax.tree.map(lambda x, s: ARRAYS(x.shape, x.dtype, sharding=s), state, shardings)
    data = jax_contenders.abstract_batch(name, batch, sharding.batch)
    step = build.jit_train_step(sharding, graphdef, recipe, shardings)
    return step.trace(state, data, jax.eval_shape(jax_contenders.hparams)), state
