"""Multi-head self-attention in the form that is fastest on the device that is traced for.

The `[N, h, T, T]` tensors are what costs time: at 197 tokens and heads of 64, a pass over one takes
about as long as a matrix product with it. cuDNN and the kernel of `packed_attention` keep them out
of memory. Elsewhere, in `attend`, the weights are computed from the scores in one pass and kept in
the type of the inputs, and their gradient is computed in one pass too.
"""

import jax
import jax.numpy as jnp

from convstem_jax.models import packed_attention
from convstem_jax.models.linear import linear, spread
from convstem_jax.models.target import has_fused_attention, on_tpu, pin_layout


def choose_form(x: jax.Array, num_tokens: int, head_width: int) -> str:
    """Which form is to be used for tokens `x`, on the device that is traced for.

    "packed" is `packed_attention`, "cudnn" is `attend_fused`, which cuDNN has for 16-bit types, and
    "xla" is `attend`.
    """
    if packed_attention.fits(x, num_tokens, head_width):
        return "packed"
    return "cudnn" if x.dtype == jnp.bfloat16 and has_fused_attention() else "xla"


def pad(x: jax.Array, num_heads: int) -> jax.Array:
    """Tokens `[N, T, C]`; where `attend_fused` is used and T is odd, a token of zeros is added."""
    _, t, c = x.shape
    if choose_form(x, t, c // num_heads) == "cudnn":
        x = jnp.pad(x, ((0, 0), (0, t % 2), (0, 0)))
    return x


def of_all_tokens(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int, num_tokens: int
) -> jax.Array:
    """Multi-head self-attention up to its output layer.

    Args:
        x: tokens, `[N, T, C]`.
        kernel: `[C, 3 * C]`: for queries, keys and values, each head by head.
        bias: `[3 * C]`, in the same order.
        num_heads: the number of heads into which C is divided.
        num_tokens: how many of the T tokens are attended to: all but the one that `pad` adds.

    Returns:
        `[N, T, C]`, of the type of `x`.
    """
    form = choose_form(x, num_tokens, x.shape[2] // num_heads)
    if form == "packed":
        return packed_attention.project_and_attend(x, kernel.astype(x.dtype), bias, num_heads)
    q, k, v = _project(x, kernel, bias, num_heads, form)
    if form == "cudnn":
        return attend_fused(q, k, v, num_tokens).reshape(x.shape)
    assert num_tokens == x.shape[1], "nothing is filled up"
    q, k, v = (y.transpose(0, 2, 3, 1) for y in (q, k, v))  # [N, h, d, T]
    return attend(q, k, v).transpose(0, 3, 1, 2).reshape(x.shape)


def of_class_token(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int, num_tokens: int
) -> jax.Array:
    """`of_all_tokens` for only the class token, the first, which attends to all: `[N, 1, C]`.

    For one query, keys and values need not be computed. The query is multiplied by the keys' kernel
    and then by the tokens themselves; the weighted mean of the tokens, not each of them, is
    multiplied by the values' kernel. The keys' bias would shift all scores alike, which does not
    change the softmax.
    """
    n, _, c = x.shape
    heads = num_heads, c // num_heads
    kernels = kernel.astype(x.dtype).reshape(c, 3, *heads)
    kernel_q, kernel_k, kernel_v = jnp.unstack(kernels, axis=1)
    bias_q, _, bias_v = bias.reshape(3, *heads)
    q = linear(x[:, 0], kernel_q, bias_q) * heads[1] ** -0.5  # [N, h, d]
    q = jnp.einsum("nhd,chd->nhc", q, kernel_k)
    scores = jnp.where(jnp.arange(x.shape[1]) < num_tokens, _scores_of_one(q, x), -jnp.inf)
    means = jnp.einsum("nht,ntc->nhc", jax.nn.softmax(scores).astype(x.dtype), x)
    values = jnp.einsum("nhc,chd->nhd", means, kernel_v)
    return (values + spread(bias_v, values)).reshape(n, c)[:, None]


@jax.custom_vjp
def _scores_of_one(q, x):
    return jnp.einsum("nhc,ntc->nht", q, x, preferred_element_type=jnp.float32)


def _scores_backward(residuals, grad):
    q, x = residuals
    grad = grad.astype(q.dtype)  # JAX's own gradient would multiply it in float32.
    return jnp.einsum("nht,ntc->nhc", grad, x), jnp.einsum("nht,nhc->ntc", grad, q)


_scores_of_one.defvjp(lambda q, x: (_scores_of_one(q, x), (q, x)), _scores_backward)


def _project(x, kernel, bias, num_heads, form):
    """Queries, keys and values: `[N, T, h, d]`."""
    n, t, c = x.shape
    heads = num_heads, c // num_heads
    # cuBLAS adds a bias that is a vector; TPUs write `[h, d]` from the product.
    shape = heads if form == "xla" else (c,)
    kernels = kernel.astype(x.dtype).reshape(c, 3, *shape)
    biases = bias.reshape(3, *shape)
    # One parameter and three products: the gradient of a single product would have to be
    # concatenated, which takes TPUs as long as the product.
    return [
        linear(x, kernel, bias).reshape(n, t, *heads)
        for kernel, bias in zip(jnp.unstack(kernels, axis=1), biases, strict=True)
    ]


def attend_fused(q: jax.Array, k: jax.Array, v: jax.Array, num_tokens: int) -> jax.Array:
    """The same as `attend`, by cuDNN, which keeps `[T, T]` out of memory.

    Args:
        q: queries, `[N, T, h, d]`, T even. JAX refuses cuDNN's backward pass for an odd T with a
            bias, and mistakes the empty array that stands for no bias for one (0.10.2, 0.11.2).
        k: keys, of the same shape.
        v: values, of the same shape.
        num_tokens: how many of the T tokens are attended to; the rows of the others are zero.

    Returns:
        `[N, T, h, d]`, of the type of the inputs.
    """
    # All alike, but made from q: JAX 0.10 cannot map cuDNN's attention over lengths that are not.
    lengths = jnp.where(q[:, 0, 0, 0] == 0, jnp.int32(num_tokens), jnp.int32(num_tokens))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`softmax(q k / sqrt(d)) v`, the softmax in float32.

    Args:
        q: queries, `[N, h, d, T]`: tokens last, where the compiler for TPUs wants them.
        k: keys, of the same shape.
        v: values, of the same shape.

    Returns:
        `[N, h, d, T]`, of the type of the inputs.
    """
    q = q * q.shape[2] ** -0.5
    return pin_layout(_attend(*map(pin_layout, (q, k, v))))


@jax.custom_vjp
def _attend(q, k, v):
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    scores = jnp.einsum("nhdt,nhds->nhst", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(scores - scores.max(axis=2, keepdims=True))
    # They are divided by their sum only after the product, on d rows instead of T.
    total = weights.sum(axis=2, keepdims=True)  # [N, h, 1, T]
    weights = weights.astype(q.dtype)  # [N, h, S, T]
    out = jnp.einsum("nhst,nhds->nhdt", weights, v, preferred_element_type=jnp.float32)
    out = (out / total).astype(q.dtype)
    return out, (q, k, v, weights, total, out)


def _backward(residuals, grad):
    q, k, v, weights, total, out = residuals
    grad = (grad.astype(jnp.float32) / total).astype(q.dtype)
    # What the softmax's gradient subtracts, sum_s p dp, is also sum_d out grad: no pass over T x T.
    shift = _inner_product(out, grad)
    grad_v = jnp.einsum("nhst,nhdt->nhds", weights, grad)
    grad_scores = jnp.einsum("nhdt,nhds->nhst", grad, v, preferred_element_type=jnp.float32)
    grad_scores = (weights.astype(jnp.float32) * (grad_scores - shift)).astype(q.dtype)
    grad_q = jnp.einsum("nhst,nhds->nhdt", grad_scores, k)
    grad_k = jnp.einsum("nhst,nhdt->nhds", grad_scores, q)
    return grad_q, grad_k, grad_v


_attend.defvjp(_forward, _backward)


def _inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner product of two `[N, h, d, T]` over d: `[N, h, 1, T]`, summed in float32.

    On TPUs the summands are rounded to the inputs' type first.
    """
    if not on_tpu():
        return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=2, keepdims=True)
    # A product with ones takes TPUs a third of the time of sums in the vector unit.
    h, d = x.shape[1:3]
    own = jnp.broadcast_to(jnp.eye(h, dtype=x.dtype)[:, :, None], (h, h, d))
    return jnp.einsum("ghd,nhdt->ngt", own, x * y, preferred_element_type=jnp.float32)[:, :, None]
