"""Batches that several trainings read one after another, also on machines without Grain.

They are the batches of `pipeline`, and are made once as long as memory holds them.
"""

import collections
from collections.abc import Iterable, Iterator
import concurrent.futures
import functools
import multiprocessing
import os

import jax
import numpy as np

from convstem_jax import preemption
from convstem_jax.data.examples import EvalExamples, TrainExamples


class Reader:
    """Reads batches of one sequence of examples.

    Args:
        examples: what to read.
        batch_size: examples of a batch.
        num_workers: processes that make batches, at most one per core; 0 for a thread of this
            process. There is only one: small images keep Python busy, not OpenCV, and two threads
            take twice as long.
        read_ahead: batches that are made before they are asked for, for each worker.
        memory: bytes of the host to keep batches in.
    """

    def __init__(
        self,
        examples: TrainExamples | EvalExamples,
        *,
        batch_size: int,
        num_workers: int = 0,
        read_ahead: int = 1,
        memory: float = 0.0,
    ):
        self.examples, self.batch_size = examples, batch_size
        num_workers = min(num_workers, len(os.sched_getaffinity(0)))
        self._ahead = read_ahead * max(1, num_workers)
        self.batch_bytes = batch_size * sum(np.asarray(x).nbytes for x in examples[0].values())
        self._room, self._kept = int(memory / self.batch_bytes), {}
        if num_workers:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                num_workers,
                mp_context=multiprocessing.get_context("spawn"),  # JAX's threads forbid a fork
                initializer=_start_worker,
                initargs=(examples,),
            )
            self._make = _make_batch_of_worker
        else:
            self._pool = concurrent.futures.ThreadPoolExecutor(1)
            self._make = functools.partial(_make_batch, examples)

    def read(
        self, numbers: Iterable[int], sharding: jax.sharding.Sharding
    ) -> Iterator[dict[str, jax.Array]]:
        """Batches of these numbers on the devices; batch k begins with example k * batch_size."""
        pending = collections.deque()
        for number in numbers:
            pending.append(self._batch(number))
            if len(pending) > self._ahead:
                yield jax.device_put(pending.popleft().result(), sharding)
        while pending:
            yield jax.device_put(pending.popleft().result(), sharding)

    def num_batches(self) -> int:
        """Batches that hold every record once."""
        return -(-len(self.examples.split) // self.batch_size)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.shutdown(cancel_futures=True)

    def _batch(self, number: int) -> concurrent.futures.Future:
        if number in self._kept:
            return self._kept[number]
        batch = self._pool.submit(self._make, number * self.batch_size, self.batch_size)
        if len(self._kept) < self._room:
            self._kept[number] = batch
        return batch


def _make_batch(examples, start: int, size: int) -> dict[str, np.ndarray]:
    rows = [examples[k] for k in range(start, start + size)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _start_worker(examples) -> None:
    global _examples  # sent once, not with every batch
    _examples = examples
    preemption.live_as_long_as_the_main_process()


def _make_batch_of_worker(start: int, size: int) -> dict[str, np.ndarray]:
    return _make_batch(_examples, start, size)
