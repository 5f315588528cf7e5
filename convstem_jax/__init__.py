"""Vision transformers with a convolutional stem, after Xiao et al., NeurIPS 2021."""

from convstem_jax.models import create_model
from convstem_jax.weights import load_model

__version__ = "0.1.0"

__all__ = ["__version__", "create_model", "load_model"]
