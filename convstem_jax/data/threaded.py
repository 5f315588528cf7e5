"""Batches on the devices by threads alone, for machines without Grain.

Decoding and resizing let other threads run. The batches are those of `pipeline`.
"""

import collections
from collections.abc import Iterable, Iterator
import concurrent.futures
import itertools

import jax
import numpy as np

from convstem_jax.data.examples import EvalExamples, TrainExamples


def train_batches(
    examples: TrainExamples, *, batch_size: int, first_step: int = 0, **reading
) -> Iterator[dict[str, jax.Array]]:
    """Endless batches, as `pipeline.train_batches`; `reading` as in `read`."""
    starts = (k * batch_size for k in itertools.count(first_step))
    return read(examples, (range(start, start + batch_size) for start in starts), **reading)


def eval_batches(
    examples: EvalExamples, *, batch_size: int, **reading
) -> Iterator[dict[str, jax.Array]]:
    """Batches that hold every record once, as one pass over `pipeline.EvalBatches`."""
    starts = range(0, len(examples.split), batch_size)
    return read(examples, (range(start, start + batch_size) for start in starts), **reading)


def read(
    examples: TrainExamples | EvalExamples,
    batches: Iterable[range],
    *,
    sharding: jax.sharding.Sharding,
    num_threads: int,
    ahead: int,
) -> Iterator[dict[str, jax.Array]]:
    """Reads batches in order.

    Args:
        examples: what to read.
        batches: the numbers of the examples of each.
        sharding: of a batch over the devices.
        num_threads: batches that are made at the same time.
        ahead: batches that are made before they are asked for.
    """

    def make(numbers):
        rows = [examples[k] for k in numbers]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return jax.device_put(batch, sharding)

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        pending = collections.deque()
        for numbers in batches:
            pending.append(pool.submit(make, numbers))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
