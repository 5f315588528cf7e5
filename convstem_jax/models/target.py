"""What a model is being traced for, and what it asks of that compiler."""

from collections.abc import Callable
import functools
import importlib.metadata
import re

import jax
from jax.experimental.layout import Layout, with_layout_constraint


def device() -> jax.sharding.AbstractDevice:
    """What the mesh in use tells of its devices: platform and kind, both empty where it does not.

    Not of the devices that are there: a program can be compiled for others.
    """
    found = jax.sharding.get_abstract_mesh().abstract_device
    return found or jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform="")


def on_cpu() -> bool:
    """Whether they are CPUs."""
    return device().platform == "cpu"


def on_gpu() -> bool:
    """Whether they are GPUs."""
    return device().platform == "gpu"


def on_tpu() -> bool:
    """Whether they are TPUs."""
    return device().platform == "tpu"


def overflows_in_fused_gradients() -> bool:
    """Whether they are TPUs for which the compiler dies of the stem's fused gradients.

    So libtpu 0.0.42 does for v6e: it fuses them into something that overflows its own stack. 0.0.50
    does not; those between have not been tried.
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
    """How many share the batch: the axis `data` of the mesh in use; 0 where it has no such axis.

    Only where XLA's partitioner is to divide it ("Auto"): an explicit axis says of each array
    whether it lies along it, and inside `jax.shard_map` an array is one device's part already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape["data"] if "data" in mesh.auto_axes else 0


def by_device(function: Callable, *, check_vma: bool = True) -> Callable:
    """`function` of each device's part of its first argument, and of the others as they are.

    To be used where XLA's partitioner would else gather the batch on every device. The batch must
    divide by the devices. Where `num_devices` is 0, it is `function`. With `check_vma` JAX checks
    what results say of the devices on which they differ.
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

    `x` has the batch first.
    """
    if not on_tpu():
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return by_device(functools.partial(with_layout_constraint, layouts=layout))(x)


def on_hopper() -> bool:
    """Whether they are GPUs of the generation of H100 and H200."""
    return re.match(r"NVIDIA G?H\d", device().device_kind) is not None


def has_fused_attention() -> bool:
    """Whether they are GPUs for which cuDNN has fused attention: NVIDIA's, Ampere or later.

    Only where such a GPU is here can its age be told; another is taken for a new one.
    """
    kind = device().device_kind
    # The oldest have names such as "Tesla T4". Asking for devices would take hold of them.
    if not kind.startswith("NVIDIA"):
        return False
    here = [found for found in jax.local_devices() if found.device_kind == kind]
    return all(float(found.compute_capability) >= 8 for found in here)
