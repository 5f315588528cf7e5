"""Gives all tests 8 CPU devices and torchvision beside a CPU build of PyTorch; orders the tests."""

import contextlib
import dataclasses
import importlib
import os
import tempfile

# Devices wait for each other inside a collective, and each needs a thread of XLA's pool then: with
# fewer threads (XLA makes one for each core) and several steps under way they would wait for ever.
os.environ["NPROC"] = "16"
# Small models for few steps: the tests, and the programs that they start, spend their time in the
# compiler. With 0 the programs are those that users get.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and jax.__version_info__ < (0, 11):
    # Halves the rest of that time; later versions have no other emitters.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    )

import pytest

from benchmarks import torch_contenders

# Before JAX starts its backends. Tests of one device use `jax.devices()[:1]`.
jax.config.update("jax_num_cpu_devices", 8)
# Whole runs compile the same programs again and again, here and in the processes of the tests.
_compiled = tempfile.TemporaryDirectory()
for name, value in (
    ("jax_compilation_cache_dir", _compiled.name),
    ("jax_persistent_cache_min_compile_time_secs", 0.3),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

torch_contenders.declare_torchvision()
# PyTorch's CUDA build loads it late, and after TensorFlow that ends in a segmentation fault.
with contextlib.suppress(ImportError):
    importlib.import_module("triton")

# Each worker of pytest-xdist takes the next file; a slow one must not be the last.
SLOWEST = (
    *("processes", "step", "train", "preflight", "models", "program", "study", "population"),
    *("gpu_forms", "benchmarks/train_step", "tpu_forms", "kernels", "docs", "weights"),
    *("benchmarks/roofline", "data/pipeline", "benchmarks/around_step"),
)


@pytest.fixture
def train_on(monkeypatch):
    """A function that gives `train` only the first `num` devices."""

    def use(num):
        from convstem_jax.sharding import Sharding

        name = "convstem_jax.train.Sharding"
        monkeypatch.setattr(name, lambda devices, *args: Sharding(devices[:num], *args))

    return use


@pytest.fixture
def shallow(monkeypatch):
    """The tiny ViTs with one block: the tests spend their time in the compiler."""
    from convstem_jax.models import MODELS

    for name in ("vitc_tiny", "vitp_tiny"):
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], depth=1))


def pytest_collection_modifyitems(items):
    """Puts the slowest files first, and keeps files whole."""
    place = {f"tests/{name}.py": i for i, name in enumerate(SLOWEST)}

    def place_of(item):
        return place.get(item.nodeid.partition("::")[0].replace("test_", ""), len(place))

    items.sort(key=place_of)
