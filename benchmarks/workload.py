"""What the benchmarks time: training steps of the paper's recipe, the same in all frameworks."""

from typing import NamedTuple

import numpy as np

from configs import common
from convstem_jax import build
from convstem_jax.models import MODELS
from convstem_jax.step import Recipe

NUM_CLASSES = 1000
LR, WEIGHT_DECAY, EMA_RATE = 1e-3, 0.1, 1e-3


class Case(NamedTuple):
    """What is to be timed."""

    model: str  # a key of `MODELS`
    implementation: str  # of `contenders.JAX` or `contenders.TORCH`
    batch: int  # images of a step
    optimizer: str = "adamw"
    torch_mode: str = "eager"  # or of torch.compile
    dtype: str = "bfloat16"  # of this project's and of PyTorch's
    xla_options: tuple[tuple[str, str], ...] = ()  # besides those of `xla_options.py`
    in_a_call: int = 1  # steps per call, in JAX

    @property
    def name(self) -> str:
        """The implementation, its options and how many steps a call makes."""
        words = [self.implementation, *("=".join(option) for option in self.xla_options)]
        if self.in_a_call > 1:
            words.append(f"({self.in_a_call} steps a call)")
        return " ".join(words)

    def __str__(self):
        return f"{self.name}, {self.model}"


def recipe_of(optimizer: str) -> Recipe:
    """The paper's recipe on ImageNet."""
    config = common.base()
    config.optimizer = optimizer
    return build.recipe(config, NUM_CLASSES)


def random_batches(case: Case) -> list[dict[str, np.ndarray]]:
    """Two batches, for alternate steps: in training no batch lies where the one before it lay.

    Each has `image`, uint8 `[N, H, W, 3]`, and `label`, int32 `[N]`.
    """
    size, rng = MODELS[case.model].image_size, np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (case.batch, size, size, 3), np.uint8),
            "label": rng.integers(0, NUM_CLASSES, case.batch, np.int32),
        }
        for _ in range(2)
    ]
