"""The order of the examples, and what is done to each: only with NumPy and OpenCV.

Every example of a run follows from its number, whoever reads it: one process or many, Grain's
workers or threads, from the start or after an interruption.
"""

import dataclasses
import functools

import numpy as np

from convstem_jax.data import augment, autoaugment
from convstem_jax.data.sources import Split


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, or the centre crop, then flip and AutoAugment where asked for."""

    image_size: int
    min_area: float  # of the random resized crop; 1 for the centre crop
    flip: bool
    auto_augment: bool = False

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Transforms one example; `rng` is its own."""
        image, size = example["image"], self.image_size
        if self.min_area < 1:
            image = augment.random_resized_crop(image, rng, size=size, min_area=self.min_area)
        else:
            image = augment.center_crop(image, resize=size, size=size)
        if self.flip:
            image = augment.random_flip(image, rng)
        if self.auto_augment:
            image = autoaugment.auto_augment(np.ascontiguousarray(image), rng)
        return example | {"image": image}


@dataclasses.dataclass(frozen=True)
class TrainExamples:
    """The endless sequence of training examples: every epoch is a new permutation of the split.

    `examples[k]` is `{"image": uint8 [H, W, 3], "label": int32}` for any k from 0.
    """

    split: Split
    transform: TrainTransform
    seed: int  # of the order and of the augmentation

    def __getitem__(self, k: int) -> dict:
        epoch, i = divmod(k, len(self.split))
        index = _permutation(self.seed, epoch, len(self.split))[i]
        return self.transform(self.split[index], np.random.default_rng((self.seed, 1, k)))


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def _permutation(seed: int, epoch: int, num: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(num)


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """Every example of a split in order, then blank ones without end.

    `examples[k]` has `image`, the centre crop, `label`, and `mask`, False for the blank ones.
    """

    split: Split
    resize: int  # short side before the centre crop
    image_size: int  # of the centre crop

    def __getitem__(self, k: int) -> dict:
        if k >= len(self.split):
            image = np.zeros((self.image_size, self.image_size, 3), np.uint8)
            return {"image": image, "label": np.int32(0), "mask": np.bool_(False)}
        example = self.split[k]
        image = augment.center_crop(example["image"], resize=self.resize, size=self.image_size)
        return example | {"image": image, "mask": np.bool_(True)}
