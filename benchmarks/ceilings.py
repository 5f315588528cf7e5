"""What this device reaches: operations a second in products of matrices, bytes a second."""

from collections.abc import Callable
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

_TIMES = 10  # in one program, so that its start does not count


def matmul_size() -> int:
    """Size of matrices whose products reach this device's peak and do not take minutes."""
    return 1024 if jax.default_backend() == "cpu" else 8192


def matmul_flops(size: int, dtype: str = "bfloat16") -> float:
    """Operations a second of products of two `size` x `size` matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, _TIMES, lambda _, y: (x @ y) * x.dtype.type(size**-0.5), x)

    return 2 * size**3 * _TIMES / _median_seconds(lambda: products(x))


def bandwidth() -> float:
    """Bytes a second that adding to a large array reads and writes."""
    # CPUs take longer to add numbers of bfloat16 than to move them.
    is_cpu = jax.default_backend() == "cpu"
    size, dtype = (2**25, jnp.float32) if is_cpu else (2**28, jnp.bfloat16)

    @functools.partial(jax.jit, donate_argnums=0)  # else the loop begins with a copy
    def add(x):
        return jax.lax.fori_loop(0, _TIMES, lambda _, y: y + dtype(1), x)

    x = jnp.zeros(size, dtype)

    def run():
        nonlocal x
        x = add(x)
        return x

    return 2 * x.nbytes * _TIMES / _median_seconds(run)


def _median_seconds(run: Callable[[], jax.Array]) -> float:
    run().block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
