"""Attention from one product for queries, keys and values: a kernel for NVIDIA's Hopper GPUs.

cuDNN's attention takes queries, keys and values as arrays of their own, which takes three products,
or copies. Here they are one array, as the product leaves it, and so is their gradient. All keys and
values of an image's head fit on a multiprocessor, so that a program of the kernel has a head for
itself: the softmax needs no running maximum, and the gradient's kernel has each query before it
once, with no sums in the memory and with the bias's gradient beside it.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from convstem_jax.models.target import by_device, on_hopper

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX announces its end. cuDNN's attention takes the place of this then.
    triton = None

# Of Triton: how many queries at once, and how many warps. Others were slower on an H200.
_FORWARD = {"num_queries": 64, "num_warps": 4}
_BACKWARD = {"num_queries": 32, "num_warps": 8}
_NUM_STAGES = 2  # The next queries are loaded beside the arithmetic.


def fits(dtype: jnp.dtype, num_tokens: int, head_width: int) -> bool:
    """Whether `project_and_attend` is to be used, by the shapes that it was measured for.

    XLA cannot divide the kernel where a mesh has explicit axes.
    """
    is_measured = dtype == jnp.bfloat16 and 128 < num_tokens <= 256 and head_width == 64
    has_explicit_axes = bool(jax.sharding.get_abstract_mesh().explicit_axes)
    return is_measured and on_hopper() and triton is not None and not has_explicit_axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project_and_attend(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int
) -> jax.Array:
    """Multi-head self-attention up to its output layer.

    Args:
        x: tokens, `[N, T, width]`.
        kernel: `[width, 3 * width]`: for queries, keys and values, each by heads.
        bias: `[3 * width]`, likewise.
        num_heads: whose width is a power of 2, 16 or more.

    Returns:
        `[N, T, width]`, of the type of `x`.
    """
    return _forward(x, kernel, bias, num_heads)[0]


def _forward(x, kernel, bias, num_heads):
    n, t, width = x.shape
    qkv = (x @ kernel + bias).reshape(n, t, 3, num_heads, -1)
    out, lse = _by_device(_attend)(qkv)
    return out.reshape(n, t, width), (x, kernel, bias, qkv, out, lse)


def _backward(num_heads, residuals, grad):
    x, kernel, bias, qkv, out, lse = residuals
    grad_qkv, grad_bias = _by_device(_gradients)((qkv, out, lse, grad.reshape(out.shape)))
    grad_qkv = grad_qkv.reshape(*x.shape[:2], -1)
    grad_kernel = jnp.einsum("ntd,nte->de", x, grad_qkv)
    grad_bias = grad_bias.sum(0).reshape(bias.shape).astype(bias.dtype)
    return grad_qkv @ kernel.T, grad_kernel, grad_bias


project_and_attend.defvjp(_forward, _backward)


# A kernel's results do not say along which axes they differ.
_by_device = functools.partial(by_device, check_vma=False)


def _attend(qkv):
    """`[N, T, h, d]`, and the logarithm to base 2 of the sums of exponentials, `[N, h, T]`."""
    n, t, _, h, d = qkv.shape
    return _call(
        functools.partial(_attend_kernel, t, _FORWARD["num_queries"]),
        (qkv, qkv, qkv),
        [_QUERIES, _KEYS, _VALUES],
        [
            jax.ShapeDtypeStruct((n, t, h, d), qkv.dtype),
            jax.ShapeDtypeStruct((n, h, t), jnp.float32),
        ],
        [_OUT, _LSE],
        _FORWARD["num_warps"],
    )


def _gradients(qkv_out_lse_grad):
    """Of the packed array, and of the bias for each image: `[N, 3, h, d]` in float32."""
    qkv, out, lse, grad = qkv_out_lse_grad
    n, t, _, h, d = qkv.shape
    return _call(
        functools.partial(_gradient_kernel, t, _BACKWARD["num_queries"]),
        (qkv, qkv, qkv, out, lse, grad),
        [_QUERIES, _KEYS, _VALUES, _OUT, _LSE, _OUT],
        [
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct((n, 3, h, d), jnp.float32),
        ],
        [_PACKED, _BIAS],
        _BACKWARD["num_warps"],
    )


# Blocks of a program, which has head h of image n: shape and index, where t stands for the tokens,
# filled up to a power of 2, and d for the head's width.
_QUERIES, _KEYS, _VALUES = (
    ((None, "t", None, None, "d"), lambda n, h, i=i: (n, 0, i, h, 0)) for i in range(3)
)
_PACKED = (None, "t", 3, None, "d"), lambda n, h: (n, 0, 0, h, 0)
_OUT = (None, "t", None, "d"), lambda n, h: (n, 0, h, 0)
_LSE = (None, None, "t"), lambda n, h: (n, h, 0)
_BIAS = (None, 3, None, "d"), lambda n, h: (n, 0, h, 0)


def _call(kernel, inputs, input_blocks, outputs, output_blocks, num_warps):
    n, t, _, h, d = inputs[0].shape
    sizes = {"t": pl.next_power_of_2(t), "d": d}

    def specs(blocks):
        return [pl.BlockSpec([sizes.get(x, x) for x in shape], index) for shape, index in blocks]

    return pl.pallas_call(
        kernel,
        grid=(n, h),
        in_specs=specs(input_blocks),
        out_shape=outputs,
        out_specs=specs(output_blocks),
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=_NUM_STAGES),
        interpret=jax.default_backend() == "cpu",
    )(*inputs)


def _attend_kernel(num_tokens, num_queries, q_ref, k_ref, v_ref, out_ref, lse_ref):
    exists = jnp.arange(len(k_ref)) < num_tokens
    k, v = _load(k_ref, exists), _load(v_ref, exists)
    scale = math.log2(math.e) / math.sqrt(k.shape[1])

    def of_queries(i, carry):
        rows, row_exists = _rows(i, num_queries, num_tokens)
        q = _load(q_ref.at[rows], row_exists)
        scores = jnp.where(exists, scale * triton.dot(q, k.T), -jnp.inf)
        largest = scores.max(1)
        weights = jnp.exp2(scores - largest[:, None])
        total = weights.sum(1)
        out = triton.dot(weights.astype(v.dtype), v) / total[:, None]
        _store(out_ref.at[rows], out, row_exists)
        triton.store(lse_ref.at[rows], largest + jnp.log2(total), mask=row_exists)
        return carry

    jax.lax.fori_loop(0, pl.cdiv(num_tokens, num_queries), of_queries, 0)


def _gradient_kernel(
    num_tokens,
    num_queries,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    grad_ref,
    grad_qkv_ref,
    grad_bias_ref,
):
    # What does not exist is loaded as zeros. Such queries have gradients of zero; such keys and
    # values have others, which are left out at the end.
    exists = jnp.arange(len(k_ref)) < num_tokens
    k, v = _load(k_ref, exists), _load(v_ref, exists)
    scale = 1 / math.sqrt(k.shape[1])

    def of_queries(i, sums):
        grad_k, grad_v, total = sums
        rows, row_exists = _rows(i, num_queries, num_tokens)
        q, out, grad = (_load(ref.at[rows], row_exists) for ref in (q_ref, out_ref, grad_ref))
        lse = triton.load(lse_ref.at[rows], mask=row_exists, other=0.0)
        shift = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(1)
        # Keys first: of all tokens there are enough for the tensor cores' large tiles.
        weights = jnp.exp2(scale * math.log2(math.e) * triton.dot(k, q.T) - lse)
        grad_v += triton.dot(weights.astype(v.dtype), grad)
        grad_scores = weights * (triton.dot(v, grad.T) - shift)
        total += grad_scores.sum(1)
        grad_scores = grad_scores.astype(q.dtype)
        grad_k += triton.dot(grad_scores, q)
        grad_q = scale * triton.dot(k.T, grad_scores).T
        _store(grad_qkv_ref.at[rows, jnp.int32(0)], grad_q, row_exists)
        return grad_k, grad_v, total

    zeros = jnp.zeros(k.shape, jnp.float32)
    sums = zeros, zeros, jnp.zeros(len(k), jnp.float32)
    num_blocks = pl.cdiv(num_tokens, num_queries)
    grad_k, grad_v, total = jax.lax.fori_loop(0, num_blocks, of_queries, sums)
    grad_k *= scale
    for i, grad in ((1, grad_k), (2, grad_v)):
        _store(grad_qkv_ref.at[:, jnp.int32(i)], grad, exists)
        grad_bias_ref[i] = jnp.where(exists[:, None], grad, 0).sum(0)
    grad_bias_ref[0] = scale * (total[:, None] * k.astype(jnp.float32)).sum(0)


def _rows(i, num, num_tokens):
    """The i-th `num` tokens, and which of them exist."""
    return pl.ds(i * num, num), i * num + jnp.arange(num) < num_tokens


def _load(ref, exists):
    return triton.load(ref, mask=exists[:, None], other=0.0)


def _store(ref, x, exists):
    triton.store(ref, x.astype(ref.dtype), mask=exists[:, None])
