"""Batches by Grain: the same ones however they are read, and no more than needed."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import grain
import jax
import numpy as np
import pytest

from convstem_jax.config import load_config
from convstem_jax.data import pipeline, sources
from convstem_jax.data.examples import EvalExamples
from tests.data.embedded import ROOT, THREADS, same, sharding, take, train_batches


def test_resuming_and_worker_processes_change_no_bit(train_split):
    reference = take(train_batches(train_split), 6)
    resumed = list(map(jax.device_get, train_batches(train_split, numbers=range(4, 6))))
    workers = pipeline.Reading(num_workers=2, num_threads=1, read_ahead=1, prefetch=1)
    worked = train_batches(train_split, numbers=range(3, 6), reading=workers)
    assert same(reference[4], resumed[0]) and same(reference[5], resumed[1])
    assert all(same(a, b) for a, b in zip(reference[3:], worked, strict=True))
    last = train_batches(train_split, numbers=range(5, 6), reading=workers)  # one worker has none
    assert same(reference[5], *last)
    assert not same(reference[0], reference[1])


def test_batches_are_made_before_one_is_asked_for(train_split, monkeypatch):
    made = threading.Event()

    def read(split, number):
        made.set()
        return {"image": np.zeros((32, 32, 3), np.uint8), "label": 0}

    monkeypatch.setattr(type(train_split), "__getitem__", read)
    with contextlib.closing(train_batches(train_split)):
        assert made.wait(60)


@pytest.mark.parametrize("numbers", [range(3, 3), range(3, 4)])
def test_workers_start_if_there_is_a_batch_to_make(numbers, train_split):
    workers = pipeline.Reading(num_workers=1, num_threads=1, read_ahead=1, prefetch=1)
    before = set(threading.enumerate())
    with contextlib.closing(train_batches(train_split, numbers=numbers, reading=workers)):
        assert bool(set(threading.enumerate()) - before) is bool(numbers)


def test_processes_share_out_each_global_batch_in_order():
    numbers = grain.MapDataset.range(96)
    whole = pipeline.local_batches(numbers, 24, process=0, num_processes=1)
    parts = [pipeline.local_batches(numbers, 24, process=p, num_processes=4) for p in range(4)]
    assert len(parts[0]) == len(whole) == 4
    for k in range(4):
        assert np.concatenate([part[k] for part in parts]).tolist() == whole[k].tolist()


@pytest.mark.parametrize(
    "num_devices, batch_size, in_batch",
    [(1, 300, 300), (8, 7, 8), (8, 500, 504), (1, 3000, 2000), (8, 1997, 2000), (1, 1, 1)],
)
def test_evaluation_covers_every_example_once(test_split, num_devices, batch_size, in_batch):
    batches = pipeline.EvalBatches(
        EvalExamples(test_split, resize=32, image_size=32),
        batch_size=batch_size,
        sharding=sharding(num_devices),
        reading=THREADS,
    )
    expected = [test_split.records[i]["label"] for i in range(2_000)]
    for _ in range(2):  # and again the next time
        seen = [(np.asarray(b["label"]), np.asarray(b["mask"])) for b in batches]
        assert {len(label) for label, _ in seen} == {in_batch}
        assert np.concatenate([label[mask] for label, mask in seen]).tolist() == expected


def test_evaluation_reads_no_more_than_a_small_split(train_split, monkeypatch):
    part = dataclasses.replace(train_split, records=[train_split.records[0]] * 5)
    examples = EvalExamples(part, resize=36, image_size=32)
    monkeypatch.setattr(sources, "decode", None)
    blank = examples[5]
    assert not blank["image"].any() and blank["image"].shape == (32, 32, 3) and not blank["mask"]
    to_devices = mock.Mock()
    monkeypatch.setattr(pipeline, "_to_devices", to_devices)
    for batch_size, num_workers in ((2048, 1), (2, 3), (1, 4)):
        reading = dataclasses.replace(THREADS, num_workers=4)
        batches = pipeline.EvalBatches(
            examples, batch_size=batch_size, sharding=sharding(), reading=reading
        )
        assert to_devices.call_args.args[3].num_workers == num_workers <= len(batches)


def test_no_more_processes_read_than_there_are_cores():
    config = load_config("configs/vitc.py")
    cores = len(os.sched_getaffinity(0))
    for asked, expected in ((0, 0), (1, 1), (10**6, cores)):
        config.num_workers = asked
        assert pipeline.Reading.of(config).num_workers == expected


def test_workers_do_not_outlive_a_main_process_that_is_killed():
    code = (
        "import os, psutil, signal, sys\n"
        "sys.path.insert(0, '.')\n"
        "from convstem_jax.data import pipeline, sources\n"
        "from tests.data.embedded import DATASETS, NAME, take, train_batches\n"
        "workers = pipeline.Reading(num_workers=1, num_threads=1, read_ahead=1, prefetch=1)\n"
        "split = sources.open_split(str(DATASETS), NAME, 'train')\n"
        "batches = train_batches(split, reading=workers)  # held: its workers end with it\n"
        "take(batches, 1)\n"
        "print(psutil.Process().children(recursive=True), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            # Workers hold the pipe open for as long as they live.
            output, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and b"pid=" in output
