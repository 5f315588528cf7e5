"""Makes the examples, the model and the step's other inputs from a configuration."""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections

from convstem_jax import optim
from convstem_jax.data.examples import EvalExamples, TrainExamples, TrainTransform
from convstem_jax.data.sources import Split
from convstem_jax.errors import ConfigError
from convstem_jax.models import create_model
from convstem_jax.sharding import Sharding
from convstem_jax.step import (
    HParams,
    PyTree,
    Recipe,
    TrainState,
    init_state,
    split_model,
    train_step,
)


def train_examples(config: ml_collections.ConfigDict, split: Split) -> TrainExamples:
    """The training examples in their order, augmented."""
    transform = TrainTransform(
        config.image_size, config.min_crop_area, config.flip, config.auto_augment
    )
    seed = config.seed if config.data_seed == -1 else config.data_seed
    return TrainExamples(split, transform, seed)


def eval_examples(config: ml_collections.ConfigDict, split: Split) -> EvalExamples:
    """The examples of an evaluation."""
    return EvalExamples(split, config.eval_resize, config.image_size)


def num_steps(config: ml_collections.ConfigDict, num_examples: int) -> int:
    """Number of updates in a whole run: nearest to the configured epochs, and at least one."""
    return max(1, round(config.epochs * num_examples / config.batch_size))


def num_precise_batches(config: ml_collections.ConfigDict, num_examples: int) -> int:
    """Number of training batches for precise BatchNorm statistics: 0 if off, else at least one.

    At most one epoch, since seeing a small data set again would tell nothing new.
    """
    if not config.precise_bn_examples:
        return 0
    return max(1, min(config.precise_bn_examples, num_examples) // config.batch_size)


def new_model(
    config: ml_collections.ConfigDict, num_classes: int, seed: int | jax.Array
) -> nnx.Module:
    """The configuration's model with random weights; `seed` may be traced.

    Raises:
        ValueError: the model's sizes do not fit together.
    """
    # Flax folds each parameter's number into the key, and the training step its own number: folding
    # in a number that no step reaches keeps the two apart.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    return create_model(
        config.model,
        num_classes=num_classes,
        image_size=config.image_size,
        dtype=jnp.dtype(config.dtype),
        rngs=nnx.Rngs(key),
        **({} if config.stem_init == "paper" else {"stem_init": config.stem_init}),
    )


def new_state(
    config: ml_collections.ConfigDict, recipe: Recipe
) -> tuple[nnx.GraphDef, Callable[[jax.Array], TrainState]]:
    """The configuration's model, and a function, to be jitted, from seed to untrained state.

    Raises:
        ConfigError: the model's sizes do not fit together.
    """

    def model(seed):
        return new_model(config, recipe.num_classes, seed)

    try:
        graphdef, _, _ = split_model(nnx.eval_shape(model, 0))
    except ValueError as error:
        raise ConfigError(f"config.model={config.model}: {error}") from error
    return graphdef, lambda seed: init_state(recipe, model(seed))


def jit_train_step(
    sharding: Sharding, graphdef: nnx.GraphDef, recipe: Recipe, shardings: PyTree, **options
) -> Callable:
    """The jitted training step: from `(state, batch, hparams)` to the new state and metrics.

    Args:
        sharding: of the run.
        graphdef: from `new_state`.
        recipe: what is fixed.
        shardings: of the state, which is donated.
        **options: further options of `jax.jit`.
    """
    return sharding.jit(
        train_step,
        graphdef,
        recipe,
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated),
        **options,
    )


def check_batch(config: ml_collections.ConfigDict, num_devices: int) -> None:
    """Checks that the batch divides evenly over devices, micro-batches and pairs to mix.

    Raises:
        ConfigError: it does not; the message names the nearest batch size that does.
    """
    together = images_together(config)
    what = f"{num_devices} devices x {config.accumulate} micro-batches (config.accumulate)"
    what += " x 2 images to mix" if together == 2 else ""
    divisor = num_devices * config.accumulate * together
    if config.batch_size % divisor:
        nearest = max(1, round(config.batch_size / divisor)) * divisor
        raise ConfigError(
            f"config.batch_size={config.batch_size} is not divisible by {what}: "
            f"use {nearest}, or another multiple of {divisor}"
        )


def images_together(config: ml_collections.ConfigDict) -> int:
    """How many images must lie on one device: mixing needs pairs."""
    return 2 if config.mixup_alpha or config.cutmix_alpha else 1


def recipe(config: ml_collections.ConfigDict, num_classes: int) -> Recipe:
    """What is fixed when the step is traced."""
    return Recipe(
        num_classes=num_classes,
        optimizer=config.optimizer,
        label_smoothing=config.label_smoothing,
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        lighting_std=config.lighting_std,
        ema_every=config.ema_every,
        mean=tuple(config.mean),
        std=tuple(config.std),
        accumulate=config.accumulate,
    )


def hparams(config: ml_collections.ConfigDict, num_examples: int) -> HParams:
    """The step's array hyper-parameters, which a study varies without recompiling."""
    rate = optim.ema_rate(
        alpha=config.ema_alpha,
        batch_size=config.batch_size,
        epochs=config.epochs,
        every=config.ema_every,
    )
    return HParams(
        lr=jnp.float32(config.lr),
        wd=jnp.float32(config.wd),
        seed=jnp.uint32(config.seed),
        num_steps=jnp.int32(num_steps(config, num_examples)),
        warmup_steps=jnp.int32(round(config.warmup_epochs * num_examples / config.batch_size)),
        ema_rate=jnp.float32(rate),
    )


def is_due(step: int, every: float) -> bool:
    """Whether `step` is the first at or after a multiple of `every`, which need not be whole."""
    return step // every > (step - 1) // every
