"""Vision transformers with a convolutional stem, after Xiao et al., NeurIPS 2021."""

import importlib

__version__ = "0.1.0"

__all__ = ["__version__", "create_model", "load_model"]

_MODULES = {"create_model": "convstem_jax.models", "load_model": "convstem_jax.weights"}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str):
    """Imports on first use, which takes seconds: the programs begin before that."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)
