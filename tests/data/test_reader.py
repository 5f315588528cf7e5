"""A reader's batches are those of the pipeline."""

import contextlib

import pytest

from convstem_jax.data import pipeline, sources
from convstem_jax.data.examples import EvalExamples, TrainExamples, _permutation
from convstem_jax.data.reader import Reader
from convstem_jax.errors import DataError
from tests.data.embedded import THREADS, TRANSFORM, same, sharding, take, train_batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_gives_the_batches_of_the_pipeline_and_makes_them_once(
    train_split, test_split, num_workers
):
    options = {"num_workers": num_workers, "read_ahead": 3}
    expected = take(train_batches(train_split, seed=3), 5)
    examples = TrainExamples(train_split, TRANSFORM, 3)
    size = 64 * (32 * 32 * 3 + 4)
    reader = Reader(examples, batch_size=64, memory=4 * size, **options)
    for numbers in (range(5), range(2, 5)):
        batches = list(reader.read(numbers, sharding()))
        assert all(same(a, expected[i]) for a, i in zip(batches, numbers, strict=True))
    made = []
    reader._make = lambda *args: made.append(args)
    list(reader.read(range(4), sharding()))
    assert not made, "made again"
    reader.close()

    examples = EvalExamples(test_split, resize=36, image_size=32)
    reader = Reader(examples, batch_size=300, **options)
    batches = list(reader.read(range(reader.num_batches()), sharding()))
    reader.close()
    options = {"batch_size": 300, "sharding": sharding(), "reading": THREADS}
    for a, b in zip(batches, pipeline.EvalBatches(examples, **options), strict=True):
        assert same(a, b) and (a["mask"] == b["mask"]).all()


def test_a_worker_of_a_reader_passes_on_what_is_wrong(train_split):
    records = [train_split.records[i] for i in range(8)]
    examples = TrainExamples(sources.Split("x/train", records, "0123456789"), TRANSFORM, 0)
    reader = Reader(examples, batch_size=4, num_workers=1)
    records[_permutation(0, 0, 8)[-1]] = {"image": b"broken", "label": 0}
    with contextlib.closing(reader), pytest.raises(DataError, match="cannot be decoded"):
        list(reader.read(range(2), sharding()))
