"""What the instructions of a traced program are: products, and programs inside them."""

from collections import Counter
from collections.abc import Iterator
import math

import jax
from jax.extend import core
import jax.numpy as jnp


def float32_products(jaxpr) -> dict[str, int]:
    """Matrix products and convolutions with a float32 operand: their types and how many."""
    found = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            operands = [v.aval for v in eqn.invars[:2]]
            if any(x.dtype == jnp.float32 for x in operands):
                found[" x ".join(f"{x.dtype}{list(x.shape)}" for x in operands)] += 1
        for inner in inner_programs(eqn):
            found.update(float32_products(inner))
    return dict(found)


def multiply_adds(eqn) -> int:
    """Multiply-adds of a matrix product or a convolution; 0 for any other instruction.

    Zeros that pad a convolution's input count, zeros that dilate it do not.
    """
    size, shapes = math.prod(eqn.outvars[0].aval.shape), [v.aval.shape for v in eqn.invars]
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return size * math.prod(shapes[0][axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        out_channels = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        per_output = math.prod(shapes[1]) // out_channels
        return size * per_output // math.prod(eqn.params["lhs_dilation"])
    return 0


def inner_programs(eqn) -> Iterator:
    """Programs that an instruction calls."""
    programs = core.Jaxpr | core.ClosedJaxpr
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, programs)):
        if isinstance(inner, programs):
            yield getattr(inner, "jaxpr", inner)
