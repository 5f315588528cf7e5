"""8 CPU devices for every test, torchvision beside a CPU build of PyTorch, slow files first."""

import contextlib
import importlib
import os
import tempfile

# Devices wait for each other inside a collective, and each needs a thread of XLA's pool then: with
# fewer threads (XLA makes one for each core) and several steps under way they would wait for ever.
os.environ["NPROC"] = "16"

import jax

from benchmarks import torch_contenders

# Before JAX starts its backends. Tests of one device use `jax.devices()[:1]`.
jax.config.update("jax_num_cpu_devices", 8)
# Tests of whole runs compile the same programs again and again.
_compiled = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

torch_contenders.declare_torchvision()
# PyTorch's CUDA build loads it late, and after TensorFlow that is a segmentation fault.
with contextlib.suppress(ImportError):
    importlib.import_module("triton")

# Each worker of pytest-xdist takes the next file; a slow one must not be the last.
SLOWEST = ("processes", "preflight", "train", "benchmarks", "gpu_forms", "tpu_forms", "docs")


def pytest_collection_modifyitems(items):
    """Sorts them, with files whole."""
    slowest = [f"test_{name}" for name in SLOWEST]
    items.sort(key=lambda item: slowest.index(name) if (name := item.path.stem) in slowest else 99)
