"""Batches on the devices, by Grain: read in parallel, batch, shard by process, prefetch.

Grain addresses every batch by its number, so the order does not depend on the number of processes,
workers or threads, nor on where a run was interrupted.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import os

from absl import flags
import grain
import jax
import ml_collections

from convstem_jax import preemption
from convstem_jax.data.examples import EvalExamples, TrainExamples

_ENDLESS = 2**62  # sys.maxsize batches of one would be more than Python can count


@dataclasses.dataclass(frozen=True)
class Reading:
    """How hard the host works; nothing here changes a batch."""

    num_workers: int  # processes that decode and augment; 0 for threads of this process
    num_threads: int  # batches that are made at the same time, in each worker
    read_ahead: int  # batches that are ready on the host, for each worker
    prefetch: int  # batches that are on the devices ahead of the step

    @classmethod
    def of(cls, config: ml_collections.ConfigDict) -> "Reading":
        """As configured, but with no more processes than there are cores."""
        # More would not be faster, and each holds batches in memory.
        num_workers = min(config.num_workers, len(os.sched_getaffinity(0)))
        return cls(num_workers, config.num_threads, config.read_ahead, config.prefetch)


def train_batches(
    examples: TrainExamples,
    *,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    reading: Reading,
    numbers: range = range(_ENDLESS),
) -> grain.DatasetIterator:
    """Shuffled batches `{"image": uint8 [N, H, W, 3], "label": int32 [N]}`.

    Batches run across the boundary between two epochs. Batch k is the same wherever `numbers`
    begin, which is what makes resuming exact: the state of the input is the number of the next
    batch. (Grain's own iterator state says the same, but only fits the number of workers that it
    was taken with.)

    Args:
        examples: in training order, from 0 without end.
        batch_size: of all processes together.
        sharding: of the batch over the devices.
        reading: how hard the host works.
        numbers: of the batches to yield, in order.
    """
    endless = grain.MapDataset.range(_ENDLESS).map(examples.__getitem__)
    batches = iter(_to_devices(endless, batch_size, sharding, reading, numbers))
    if numbers:
        batches.start_prefetch()  # workers take seconds to start; meanwhile the caller can go on
    return batches


class EvalBatches:
    """Batches that hold every record exactly once, in order, each time they are iterated over.

    The last batch is filled up with blank examples; `mask` bool `[N]` is False there. Without them
    the number of examples would have to be divisible by the batch and the devices.

    One endless stream feeds all the passes, so that worker processes start once and the first
    batches of the next pass are ready when it begins. A pass has to be finished.

    Args:
        examples: what to read.
        batch_size: of all processes together; lowered to the split's size, then raised to a
            multiple of the devices.
        sharding: of the batch over the devices.
        reading: how hard the host works.
    """

    def __init__(
        self,
        examples: EvalExamples,
        *,
        batch_size: int,
        sharding: jax.sharding.Sharding,
        reading: Reading,
    ):
        batch_size = min(batch_size, len(examples.split))
        batch_size += -batch_size % sharding.num_devices
        self._num_batches = -(-len(examples.split) // batch_size)
        # More workers would only fill their buffers with batches of later passes.
        num_workers = min(reading.num_workers, self._num_batches)
        reading = dataclasses.replace(reading, num_workers=num_workers)
        padded = grain.MapDataset.range(self._num_batches * batch_size).map(examples.__getitem__)
        self._batches = _to_devices(
            padded.repeat(_ENDLESS // len(padded)), batch_size, sharding, reading
        )
        self._stream = None

    def __len__(self) -> int:
        """Batches of a pass."""
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        if self._stream is None:
            self._stream = iter(self._batches)
        return itertools.islice(self._stream, self._num_batches)

    def close(self) -> None:
        """Ends the worker processes, which have already begun the next pass."""
        if self._stream is not None:
            self._stream.close()


def local_batches(
    examples: grain.MapDataset, batch_size: int, *, process: int, num_processes: int
) -> grain.MapDataset:
    """The rows of every global batch that belong to one process.

    They are contiguous, and their concatenation in the order of the processes is the global batch:
    the same rows reach the same devices whatever the number of processes.
    """
    return examples.batch(batch_size // num_processes)[process::num_processes]


def _start_worker(unused_index: int, unused_count: int) -> None:
    preemption.live_as_long_as_the_main_process()


def _to_devices(
    examples: grain.MapDataset,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    reading: Reading,
    numbers: range = range(_ENDLESS),
) -> grain.IterDataset:
    local = local_batches(
        examples, batch_size, process=jax.process_index(), num_processes=jax.process_count()
    )[numbers.start : numbers.stop]
    options = grain.ReadOptions(
        num_threads=reading.num_threads,
        prefetch_buffer_size=max(reading.num_threads, reading.read_ahead),
    )
    batches = local.to_iter_dataset(options)
    if reading.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read its flags
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=reading.num_workers, per_worker_buffer_size=reading.read_ahead
            ),
            worker_init_fn=_start_worker,
        )

    def put(batch):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    return grain.experimental.ThreadPrefetchIterDataset(
        batches.map(put), prefetch_buffer_size=reading.prefetch
    )
