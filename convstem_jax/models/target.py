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


def on_gpu() -> bool:
    """Whether that kind is NVIDIA's."""
    return device_kind().startswith("NVIDIA")


def has_fused_attention() -> bool:
    """Whether that kind is a GPU for which cuDNN has fused attention: Ampere or later."""
    return on_gpu() and float(jax.local_devices(backend="gpu")[0].compute_capability) >= 8
