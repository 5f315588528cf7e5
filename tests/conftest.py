"""Gives every test 8 CPU devices, and torchvision beside a CPU build of PyTorch."""

import importlib.util
import os
import pathlib
import re
import tempfile

# Devices wait for each other inside a collective, and each needs a thread of XLA's pool then: with
# fewer threads (XLA makes one for each core) and several steps under way they would wait for ever.
os.environ["NPROC"] = "16"

import jax
import torch

# Before JAX starts its backends. Tests of one device use `jax.devices()[:1]`.
jax.config.update("jax_num_cpu_devices", 8)
# Tests of whole runs compile the same programs again and again.
_compiled = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# The package index has torchvision for CUDA builds of PyTorch only. Its networks are plain Python
# and run on any build, once its compiled operations, which they do not use, are declared.
_library = torch.library.Library("torchvision", "FRAGMENT")
_folder = pathlib.Path(importlib.util.find_spec("torchvision").origin).parent
_text = (_folder / "_meta_registrations.py").read_text()
for _name in set(re.findall(r'(?:register_meta\("|register_fake\("torchvision::)(\w+)"', _text)):
    if not hasattr(torch.ops.torchvision, _name):
        _library.define(f"{_name}() -> Tensor")
