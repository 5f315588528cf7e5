"""Attention from one product for queries, keys and values: a kernel for NVIDIA's Hopper GPUs.

cuDNN's attention takes queries, keys and values as separate arrays, which takes three products, or
copies. Here they are one array, as the product leaves it, and so is their gradient. All keys and
values of an image's head fit on a multiprocessor, so that a program of the kernel handles a whole
head: the softmax needs no running maximum, and the gradient's kernel visits each query once, keeps
no sums in memory, and computes the bias's gradient on the way.
"""

import functools
import math
import types

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np

from convstem_jax.models import kernels
from convstem_jax.models.kernels import load, store, triton
from convstem_jax.models.linear import linear

# Pallas' interpreter does not take Python numbers as indices next to slices.
_Q, _K, _V = map(np.int32, range(3))
# How many queries a program handles at once. Other numbers of them, or of warps, were slower.
_QUERIES, _QUERIES_OF_GRADIENT = 64, 32


def fits(x: jax.Array, num_tokens: int, head_width: int) -> bool:
    """Whether `project_and_attend` is to be used for `x`: a head must fill a multiprocessor."""
    return kernels.are_used(x) and 128 < num_tokens <= 256 and head_width == 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def project_and_attend(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int
) -> jax.Array:
    """Multi-head self-attention up to its output layer.

    A program holds all T keys and values of a head, padded to a power of 2: above 256 they would
    not fit in its registers.

    Args:
        x: tokens, `[N, T, C]`.
        kernel: `[C, 3 * width]`: for queries, keys and values, each head by head.
        bias: `[3 * width]`, in the same order.
        num_heads: number of heads; a head's width is a power of 2, 16 or more.

    Returns:
        `[N, T, width]`, of the type of `x`.
    """
    return _forward(x, kernel, bias, num_heads)[0]


def _forward(x, kernel, bias, num_heads):
    n, t, _ = x.shape
    qkv = linear(x, kernel, bias).reshape(n, t, 3, num_heads, -1)
    out, lse = kernels.by_device(_attend)(qkv)
    return out.reshape(n, t, -1), (x, kernel, bias, qkv, out, lse)


def _backward(num_heads, residuals, grad):
    x, kernel, bias, qkv, out, lse = residuals
    grad_qkv, grad_bias = kernels.by_device(_gradients)((qkv, out, lse, grad.reshape(out.shape)))
    grad_qkv = grad_qkv.reshape(*x.shape[:2], -1)
    grad_kernel = jnp.einsum("ntd,nte->de", x, grad_qkv)
    grad_bias = grad_bias.sum(0).reshape(bias.shape).astype(bias.dtype)
    return grad_qkv @ kernel.T, grad_kernel, grad_bias


project_and_attend.defvjp(_forward, _backward)


def _attend(qkv):
    """Attention `[N, T, h, d]`, and the base-2 logarithm of sums of exponentials, `[N, h, T]`."""
    n, t, _, h, d = qkv.shape
    blocks = _blocks(t, d)
    call = kernels.call(
        functools.partial(_attend_kernel, t),
        name="attention",
        grid=(n, h),
        in_specs=blocks.of_qkv,
        out_specs=[blocks.out, blocks.lse],
        out_shape=[
            jax.ShapeDtypeStruct((n, t, h, d), qkv.dtype),
            jax.ShapeDtypeStruct((n, h, t), jnp.float32),
        ],
        num_warps=4,
        num_stages=2,
    )
    return call(qkv, qkv, qkv)


def _gradients(qkv_out_lse_grad):
    """Gradients of the packed array, and of the bias for each image: `[N, 3, h, d]` in float32."""
    qkv, out, lse, grad = qkv_out_lse_grad
    n, t, _, h, d = qkv.shape
    blocks = _blocks(t, d)
    call = kernels.call(
        functools.partial(_gradient_kernel, t),
        name="attention_gradient",
        grid=(n, h),
        in_specs=[*blocks.of_qkv, blocks.out, blocks.lse, blocks.out],
        out_specs=[blocks.packed, blocks.bias],
        out_shape=[
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct((n, 3, h, d), jnp.float32),
        ],
        num_warps=8,
        num_stages=3,
    )
    return call(qkv, qkv, qkv, out, lse, grad)


def _blocks(t, d):
    """The blocks of the arrays that a program handles: those of head h of image n."""
    t = pl.next_power_of_2(t)
    return types.SimpleNamespace(
        of_qkv=[  # queries, keys and values separately
            pl.BlockSpec((None, t, None, None, d), lambda n, h, i=i: (n, 0, i, h, 0))
            for i in range(3)
        ],
        packed=pl.BlockSpec((None, t, 3, None, d), lambda n, h: (n, 0, 0, h, 0)),
        out=pl.BlockSpec((None, t, None, d), lambda n, h: (n, 0, h, 0)),
        lse=pl.BlockSpec((None, None, t), lambda n, h: (n, h, 0)),
        bias=pl.BlockSpec((None, 3, None, d), lambda n, h: (n, 0, h, 0)),
    )


def _attend_kernel(num_tokens, q_ref, k_ref, v_ref, out_ref, lse_ref):
    exists = (jnp.arange(len(k_ref)) < num_tokens)[:, None]
    k, v = load(k_ref, exists), load(v_ref, exists)
    scale = math.log2(math.e) / math.sqrt(k.shape[1])

    def of_queries(i, carry):
        rows, row_exists = _rows(i, _QUERIES, num_tokens)
        q = load(q_ref.at[rows], row_exists)
        scores = jnp.where(exists.T, scale * triton.dot(q, k.T), -jnp.inf)
        largest = scores.max(1)
        weights = jnp.exp2(scores - largest[:, None])
        total = weights.sum(1)
        out = triton.dot(weights.astype(v.dtype), v) / total[:, None]
        store(out_ref.at[rows], out, row_exists)
        store(lse_ref.at[rows], largest + jnp.log2(total), row_exists[:, 0])
        return carry

    jax.lax.fori_loop(0, pl.cdiv(num_tokens, _QUERIES), of_queries, 0)


def _gradient_kernel(
    num_tokens,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    grad_ref,
    grad_qkv_ref,
    grad_bias_ref,
):
    # Tokens that do not exist are loaded as zeros. Such queries have zero gradients; gradients of
    # such keys and values are not stored, and add zeros to those of the queries.
    exists = (jnp.arange(len(k_ref)) < num_tokens)[:, None]
    k, v = load(k_ref, exists), load(v_ref, exists)
    scale = 1 / math.sqrt(k.shape[1])

    def of_queries(i, sums):
        grad_k, grad_v, sum_q, sum_v = sums
        rows, row_exists = _rows(i, _QUERIES_OF_GRADIENT, num_tokens)
        q, out, grad = (load(ref.at[rows], row_exists) for ref in (q_ref, out_ref, grad_ref))
        lse = load(lse_ref.at[rows], row_exists[:, 0])
        grad_32 = grad.astype(jnp.float32)
        shift = (out.astype(jnp.float32) * grad_32).sum(1)
        # Keys first: being those of all tokens, they fill the tensor cores' large tiles.
        scores = scale * math.log2(math.e) * triton.dot(k, q.T)
        # None is above 1 except for keys that do not exist, where infinity times zero would be NaN.
        weights = jnp.exp2(jnp.minimum(scores - lse, 0))
        grad_v += triton.dot(weights.astype(v.dtype), grad)
        grad_scores = weights * (triton.dot(v, grad.T) - shift)
        grad_scores = grad_scores.astype(q.dtype)
        grad_k += triton.dot(grad_scores, q)
        grad_q = scale * triton.dot(k.T, grad_scores)  # [d, queries]
        store(grad_qkv_ref.at[rows, _Q], grad_q.T, row_exists)
        return grad_k, grad_v, sum_q + grad_q, sum_v + grad_32

    shapes = (
        k.shape,
        k.shape,
        (k.shape[1], _QUERIES_OF_GRADIENT),
        (_QUERIES_OF_GRADIENT, k.shape[1]),
    )
    sums = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    num_blocks = pl.cdiv(num_tokens, _QUERIES_OF_GRADIENT)
    grad_k, grad_v, sum_q, sum_v = jax.lax.fori_loop(0, num_blocks, of_queries, sums)
    store(grad_qkv_ref.at[:, _K], scale * grad_k, exists)
    store(grad_qkv_ref.at[:, _V], grad_v, exists)
    # A shift of all keys changes no weight, and the weights of all values sum to 1.
    grad_bias_ref[0] = sum_q.sum(1)
    grad_bias_ref[1] = jnp.zeros(k.shape[1], jnp.float32)
    grad_bias_ref[2] = sum_v.sum(0)


def _rows(i, num, num_tokens):
    """The i-th `num` tokens, and which of them exist: `[num, 1]`."""
    return pl.ds(i * num, num), (i * num + jnp.arange(num) < num_tokens)[:, None]
