"""The contenders in JAX: several steps in a call, and the plain model."""

from flax import nnx
import jax
import numpy as np
import pytest

from benchmarks import jax_contenders
from benchmarks.workload import Case


@pytest.mark.usefixtures("shallow")
def test_steps_in_one_call_are_the_same_steps(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    same = {"image": images, "label": np.arange(2, dtype=np.int32)}
    two = jax_contenders.Training.of(Case("vitp_tiny", "convstem_jax", 2)).batches
    (a, b), (c, d) = ([next(two)[name] for _ in range(2)] for name in ("image", "label"))
    assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() and (a != b).any()
    assert c.unsafe_buffer_pointer() != d.unsafe_buffer_pointer()
    monkeypatch.setattr(jax_contenders, "random_batches", lambda case: [same, same])

    def loss_and_step(in_a_call):
        case = Case("vitp_tiny", "convstem_jax", 2, dtype="float32", in_a_call=in_a_call)
        step = jax_contenders.JaxStep(case)
        made = int(step._state.step)
        return step.run(8 - made), made, int(step._state.step)

    (loss, *made), (expected, *made_of_one) = loss_and_step(2), loss_and_step(1)
    assert made == [6, 8] and made_of_one == [3, 8]
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["vitc_18gf", "vitp_1gf"])
def test_the_plain_model_is_the_same_network(name):
    def sizes(implementation):
        model = nnx.eval_shape(jax_contenders.new_model(implementation, name))
        params = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        return sum(x.size for x in params)

    assert sizes("plain Flax, bfloat16") == sizes("convstem_jax")
    assert jax_contenders.new_model("plain Flax, bfloat16", "regnety_1gf") is None
