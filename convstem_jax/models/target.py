"""What a model is being traced for."""

import jax


def device_kind() -> str:
    """Kind of the devices, such as "TPU v5 lite", as far as the mesh in use tells; else empty.

    Not of the devices that are there: a program can be compiled for others.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else ""


def on_tpu() -> bool:
    """Whether that kind is a TPU."""
    return device_kind().startswith("TPU")
