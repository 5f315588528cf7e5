"""Training steps in JAX: this project's, and the same around a model of Flax's stock layers."""

from collections.abc import Callable, Iterator
import itertools
import time
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import (
    EMA_RATE,
    LR,
    NUM_CLASSES,
    WEIGHT_DECAY,
    Case,
    random_batches,
    recipe_of,
)
from convstem_jax import build
from convstem_jax.models import MODELS, create_model
from convstem_jax.models.vit import ViTSpec
from convstem_jax.sharding import Sharding, bytes_of_program
from convstem_jax.step import HParams, Recipe, TrainState, init_state, split_model, train_step

OURS = "convstem_jax"
IMPLEMENTATIONS = (OURS, "plain Flax, bfloat16", "plain Flax, float32")


class PlainBlock(nnx.Module):
    """Pre-norm block of stock layers, as Flax's own documentation would have one write it."""

    def __init__(self, spec: ViTSpec, **kwargs):
        self.norm1 = nnx.LayerNorm(spec.width, **kwargs)
        self.attention = nnx.MultiHeadAttention(spec.num_heads, spec.width, decode=False, **kwargs)
        self.norm2 = nnx.LayerNorm(spec.width, **kwargs)
        self.fc1 = nnx.Linear(spec.width, spec.mlp_dim, **kwargs)
        self.fc2 = nnx.Linear(spec.mlp_dim, spec.width, **kwargs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False))


class PlainViT(nnx.Module):
    """The paper's ViT of stock layers only: separate query, key and value, defaults elsewhere."""

    def __init__(self, spec: ViTSpec, *, dtype, rngs: nnx.Rngs):
        kwargs = {"dtype": dtype, "rngs": rngs}
        layers, num_in = [], 3
        for channels, stride in zip(spec.stem_channels, spec.stem_strides, strict=True):
            conv = nnx.Conv(
                num_in, channels, (3, 3), stride, padding=1, use_bias=False, **kwargs
            )  # fmt: skip
            layers += [conv, nnx.BatchNorm(channels, **kwargs), nnx.relu]
            num_in = channels
        size = 1 if layers else spec.patch_size
        layers.append(nnx.Conv(num_in, spec.width, (size, size), size, **kwargs))
        self.stem = nnx.Sequential(*layers)
        num_tokens = 1 + (spec.image_size // spec.patch_size) ** 2
        self.class_token = nnx.Param(jnp.zeros((1, 1, spec.width)))
        self.position_embedding = nnx.Param(jnp.zeros((1, num_tokens, spec.width)))
        self.blocks = nnx.List(PlainBlock(spec, **kwargs) for _ in range(spec.depth))
        self.norm = nnx.LayerNorm(spec.width, **kwargs)
        self.head = nnx.Linear(spec.width, NUM_CLASSES, **kwargs)

    def __call__(self, images):
        x = self.stem(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.position_embedding[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def new_model(
    implementation: str, name: str, dtype: str = "bfloat16"
) -> Callable[[], nnx.Module] | None:
    """A function that makes the model; None where this implementation has no such model.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        name: a key of `MODELS`.
        dtype: of this project's model; the names of the others say theirs.
    """
    if implementation == OURS:
        return lambda: create_model(name, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    spec = MODELS[name]
    if not isinstance(spec, ViTSpec) or spec.stem_kernels or spec.stem_norm:
        return None
    own = jnp.dtype(implementation.rpartition(" ")[2])
    return lambda: PlainViT(spec, dtype=own, rngs=nnx.Rngs(0))


def hparams() -> HParams:
    """Hyper-parameters of a run of 10,000 steps."""
    return HParams(
        lr=jnp.float32(LR), wd=jnp.float32(WEIGHT_DECAY), seed=jnp.uint32(0),
        num_steps=jnp.int32(10_000), warmup_steps=jnp.int32(0), ema_rate=jnp.float32(EMA_RATE),
    )  # fmt: skip


def abstract_state(
    new: Callable[[], nnx.Module], recipe: Recipe
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a model, and the shapes of its state."""
    graphdef, _, _ = split_model(nnx.eval_shape(new))
    return graphdef, jax.eval_shape(lambda: init_state(recipe, new()))


def abstract_batch(model: str, num: int, sharding: jax.sharding.Sharding | None = None) -> dict:
    """The shapes of `num` images and labels."""
    size = MODELS[model].image_size
    return {
        "image": jax.ShapeDtypeStruct((num, size, size, 3), jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((num,), jnp.int32, sharding=sharding),
    }


def new_state(
    new: Callable[[], nnx.Module], recipe: Recipe, sharding: Sharding
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a model, and a state with random weights on the devices.

    The model's own initialisation would have to be compiled, for minutes at worst.
    """
    graphdef, abstract = abstract_state(new, recipe)
    rng = np.random.default_rng(0)

    def value(path, x):
        if x.ndim > 1:
            return np.float32(0.02) * rng.standard_normal(x.shape, x.dtype)
        return np.full(x.shape, getattr(path[-1], "key", None) in ("scale", "var"), x.dtype)

    weights = {"params": abstract.params, "batch_stats": abstract.batch_stats}
    weights = jax.tree.map_with_path(value, weights)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = state._replace(**weights, ema=jax.tree.map(np.copy, weights))
    return graphdef, jax.device_put(state, sharding.of_state(abstract))


class Training(NamedTuple):
    """A training step on the first device, not yet compiled, and what it takes."""

    recipe: Recipe
    sharding: Sharding
    graphdef: nnx.GraphDef
    step: Callable
    state: TrainState
    batches: Iterator[dict]  # without end, one for each call
    hparams: HParams

    @classmethod
    def of(cls, case: Case):
        """A training step with random weights and images."""
        recipe, sharding = recipe_of(case.optimizer), Sharding(jax.devices()[:1])
        new = new_model(case.implementation, case.model, case.dtype)
        graphdef, state = new_state(new, recipe, sharding)
        # As in training: what the models do for a device depends on the mesh.
        options = {} if case.implementation == OURS else {"compiler_options": {}}  # XLA's own
        step = build.jit_train_step(sharding, graphdef, recipe, sharding.of_state(state), **options)
        batches, by = random_batches(case), sharding.batch
        if case.in_a_call > 1:
            by = sharding.replicated  # the first axis is of steps
            batches = [jax.tree.map(lambda x: np.stack([x] * case.in_a_call), x) for x in batches]
            step = sharding.jit(_train_steps, graphdef, recipe, donate_argnums=0)
        batches = itertools.cycle(jax.device_put(batches, by))
        given = jax.device_put(hparams(), sharding.replicated)
        return cls(recipe, sharding, graphdef, step, state, batches, given)


class JaxStep:
    """A compiled training step with its state and batches on the first device."""

    def __init__(self, case: Case):
        """Compiles the step and makes the first ones; `compile_seconds` includes both."""
        _, _, _, step, self._state, self._batches, self._hparams = Training.of(case)
        self._in_a_call = case.in_a_call
        start = time.perf_counter()
        lowered = step.lower(self._state, next(self._batches), self._hparams)
        # Besides those of `Sharding.jit`. JAX takes numbers as text, but not true or false.
        truths = {"true": True, "false": False}
        options = {name: truths.get(text, text) for name, text in case.xla_options}
        self._step = lowered.compile(options)
        self.run(3 * self._in_a_call)
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = bytes_of_program(self._step)

    def run(self, num_steps: int) -> float:
        """Makes so many steps (a call's, if it makes more) and waits; returns the last loss."""
        for _ in range(max(1, num_steps // self._in_a_call)):
            self._state, metrics = self._step(self._state, next(self._batches), self._hparams)
        return float(metrics["loss"])


def _train_steps(graphdef, recipe, state, batches, hparams):
    """`train_step` on stacked batches, one after the other; returns the last one's metrics."""

    def step(state, batch):
        return train_step(graphdef, recipe, state, batch, hparams)

    state, metrics = jax.lax.scan(step, state, batches)
    return state, jax.tree.map(lambda x: x[-1], metrics)
