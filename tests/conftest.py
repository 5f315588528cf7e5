"""Gives every test 8 CPU devices."""

import os

# Devices wait for each other inside a collective, and each needs a thread of XLA's pool then: with
# fewer threads (XLA makes one for each core) and several steps under way they would wait for ever.
os.environ["NPROC"] = "16"

import jax

# Before JAX starts its backends. Tests of one device use `jax.devices()[:1]`.
jax.config.update("jax_num_cpu_devices", 8)
