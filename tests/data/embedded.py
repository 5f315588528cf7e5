"""The embedded data set, and batches of it."""

import pathlib

import jax

from convstem_jax.data import pipeline
from convstem_jax.data.examples import TrainExamples, TrainTransform

ROOT = pathlib.Path(__file__).parents[2]
DATASETS = ROOT / "datasets"
NAME = "fashion_mnist_10k"
THREADS = pipeline.Reading(num_workers=0, num_threads=2, read_ahead=2, prefetch=2)
TRANSFORM = TrainTransform(image_size=32, min_area=0.5, flip=True)


def sharding(num_devices=1):
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        devices=jax.devices()[:num_devices],
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    return jax.NamedSharding(mesh, jax.P("data"))


def train_batches(split, *, seed=0, reading=THREADS, transform=TRANSFORM, **kwargs):
    return pipeline.train_batches(
        TrainExamples(split, transform, seed),
        batch_size=64,
        sharding=sharding(),
        reading=reading,
        **kwargs,
    )


def take(batches, num):
    return [jax.device_get(next(batches)) for _ in range(num)]


def same(a, b):
    return (a["image"] == b["image"]).all() and (a["label"] == b["label"]).all()
