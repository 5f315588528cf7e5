"""The devices that a model is being traced for, and what it asks of their compiler."""

from collections.abc import Callable
import functools
import importlib.metadata
import re

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def device() -> jax.sharding.AbstractDevice:
    """Platform and kind of the devices of the mesh in use, both empty where it does not tell.

    Not of the devices of this machine: a program can be compiled for others.
    """
    found = jax.sharding.get_abstract_mesh().abstract_device
    return found or jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform="")


def on_cpu() -> bool:
    """Whether the devices of the mesh in use are CPUs."""
    return device().platform == "cpu"


def on_gpu() -> bool:
    """Whether the devices of the mesh in use are GPUs."""
    return device().platform == "gpu"


def on_tpu() -> bool:
    """Whether the devices of the mesh in use are TPUs."""
    return device().platform == "tpu"


def overflows_in_fused_gradients() -> bool:
    """Whether the compiler would crash on the stem's fused gradients for the TPUs in use.

    libtpu 0.0.42 does for v6e: it fuses them into something that overflows its own stack. 0.0.50
    does not; versions between have not been tried.
    """
    return device().device_kind == "TPU v6 lite" and _libtpu() < (0, 0, 50)


@functools.cache
def _libtpu() -> tuple[int, ...]:
    """Version of the TPU compiler; the oldest where it is not known."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version("libtpu"))))
    except importlib.metadata.PackageNotFoundError:
        return ()


def num_devices() -> int:
    """How many devices share the batch: the axis `data` of the mesh in use, or 0 without one.

    The axis counts only where XLA's partitioner is to divide arrays along it ("Auto"): for an
    explicit axis each array says whether it lies along it, and inside `jax.shard_map` an array is
    already one device's part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] if "data" in mesh.auto_axes else 0


def by_device(function: Callable, *, check_vma: bool = True) -> Callable:
    """Makes `function` take each device's part of its first argument, and the others as they are.

    To be used where XLA's partitioner would otherwise gather the batch on every device. The batch
    must be divisible by the devices. Where `num_devices` is 0, this returns `function` itself. With
    `check_vma` JAX checks what results say about the devices on which they differ.
    """
    if not num_devices():
        return function

    def mapped(x, *others):
        specs = jax.P("data"), *[jax.P()] * len(others)
        return jax.shard_map(
            function, in_specs=specs, out_specs=jax.P("data"), check_vma=check_vma
        )(x, *others)

    return mapped


def pin_layout(x: jax.Array) -> jax.Array:
    """Keeps the compiler for TPUs from permuting the axes, which ends in copies of large arrays.

    The first axis of `x` is the batch.
    """
    if not on_tpu():
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return by_device(functools.partial(with_layout_constraint, layouts=layout))(x)


def on_hopper() -> bool:
    """Whether the devices of the mesh in use are GPUs of the generation of H100 and H200."""
    return re.match(r"NVIDIA G?H\d", device().device_kind) is not None


def has_fused_attention() -> bool:
    """Whether cuDNN has fused attention for the devices in use: NVIDIA's GPUs, Ampere or later.

    The generation can be told only of a kind of GPU that is here; another is taken for a new one.
    """
    kind = device().device_kind
    # The oldest GPUs have names such as "Tesla T4". Asking for devices would take hold of them.
    if not kind.startswith("NVIDIA"):
        return False
    here = [found for found in jax.local_devices() if found.device_kind == kind]
    return all(float(found.compute_capability) >= 8 for found in here)
