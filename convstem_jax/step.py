"""The training step and the evaluation step, as pure functions of arrays.

There is one `train_step`. The loop jits it, the study vmaps it over `hparams`, the benchmarks time
it and the preflight compiles it for other machines. Its first two arguments are static:
`Sharding.jit` binds them.
"""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from convstem_jax import mixing, optim

PyTree = Any


class TrainState(NamedTuple):
    """All that training carries from step to step: nested dicts of arrays."""

    step: jax.Array  # updates made so far, int32
    params: PyTree
    batch_stats: PyTree  # BatchNorm's running means and variances
    opt_state: PyTree
    ema: PyTree  # {"params", "batch_stats"}: what evaluation uses


class HParams(NamedTuple):
    """What a study varies between trials; arrays, so that all trials share one program."""

    lr: jax.Array  # base learning rate
    wd: jax.Array  # weight decay
    seed: jax.Array  # of lighting, mixup and CutMix, uint32
    num_steps: jax.Array  # updates of the whole schedule, int32
    warmup_steps: jax.Array  # those of them in which the learning rate warms up, int32
    ema_rate: jax.Array  # see `optim.ema_rate`


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is fixed when the step is traced."""

    num_classes: int
    optimizer: str  # a key of `optim.OPTIMIZERS`
    label_smoothing: float
    mixup_alpha: float  # 0 for none
    cutmix_alpha: float  # 0 for none
    lighting_std: float  # 0 for none
    ema_every: int
    mean: tuple[float, float, float]  # of the images' channels, in [0, 1]
    std: tuple[float, float, float]
    accumulate: int = 1  # micro-batches that one update averages


def init_state(recipe: Recipe, model: nnx.Module) -> TrainState:
    """State of an untrained model; call it under `jax.jit` to make the arrays where they belong."""
    _, params, batch_stats = split_model(model)
    # Learning rate and weight decay have no part in the initial state.
    opt_state = optim.OPTIMIZERS[recipe.optimizer](0.0, 0.0).init(params)
    # A second set of buffers: donating the state must not donate one buffer twice.
    ema = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, ema)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Takes a model apart into its graph, parameters and BatchNorm statistics (plain dicts)."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def by_name(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, as `params/blocks/0/norm1/scale`: the number 0 and the text "0" are alike."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def train_step(
    graphdef: nnx.GraphDef, recipe: Recipe, state: TrainState, batch: PyTree, hparams: HParams
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the parameters, the statistics and the EMA.

    Args:
        graphdef: the model's structure, from `split_model`.
        recipe: what is fixed.
        state: before the update; donate it.
        batch: `image` uint8 `[N, H, W, 3]` and `label` int32 `[N]`.
        hparams: learning rate, weight decay, seed and schedule.

    Returns:
        The state after the update, and scalars: loss, gradient norm, learning rate.
    """

    light_key, mix_key = jax.random.split(
        jax.random.fold_in(jax.random.key(hparams.seed), state.step)
    )
    num, height, width, _ = batch["image"].shape
    batch = batch | {"light": mixing.lighting(light_key, num, recipe.lighting_std)}
    mask = mixing.draw_mask(
        mix_key, height, width, mixup_alpha=recipe.mixup_alpha, cutmix_alpha=recipe.cutmix_alpha
    )

    def loss_fn(params, batch_stats, batch):
        model = nnx.merge(graphdef, params, batch_stats)
        model.train()
        images, targets = model_inputs(recipe, batch, mask)
        logits = model(images)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def loss_and_grads(batch_stats, batch):
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch_stats, batch
        )
        return batch_stats, (loss, grads)

    def add_micro_batch(carry, micro_batch):
        batch_stats, sums = carry
        batch_stats, new = loss_and_grads(batch_stats, micro_batch)
        return (batch_stats, jax.tree.map(jnp.add, sums, new)), None

    if recipe.accumulate == 1:
        batch_stats, (loss, grads) = loss_and_grads(state.batch_stats, batch)
    else:
        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        micro_batches = jax.tree.map(lambda x: _interleave(x, recipe.accumulate), batch)
        (batch_stats, sums), _ = jax.lax.scan(
            add_micro_batch, (state.batch_stats, zeros), micro_batches
        )
        loss, grads = jax.tree.map(lambda x: x / recipe.accumulate, sums)

    lr = hparams.lr * optim.lr_factor(
        state.step, num_steps=hparams.num_steps, warmup_steps=hparams.warmup_steps
    )
    optimizer = optim.OPTIMIZERS[recipe.optimizer](lr, hparams.wd)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optim.update_ema(
        state.ema,
        {"params": params, "batch_stats": batch_stats},
        state.step,
        rate=hparams.ema_rate,
        every=recipe.ema_every,
        warmup_steps=hparams.warmup_steps,
    )
    metrics = {"loss": loss, "grad_norm": optim.norm(grads), "lr": lr}
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema), metrics


def model_inputs(recipe: Recipe, batch: PyTree, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images as the model takes them, and the class probabilities to learn.

    Args:
        recipe: what is fixed.
        batch: `image` and `label` as in `train_step`, and `light` from `mixing.lighting`.
        mask: from `mixing.draw_mask`.
    """
    images = normalize(batch["image"], recipe, batch["light"])
    targets = optax.smooth_labels(
        jax.nn.one_hot(batch["label"], recipe.num_classes), recipe.label_smoothing
    )
    if recipe.mixup_alpha or recipe.cutmix_alpha:
        images, targets = mixing.mix(images, targets, mask)
    return images, targets


def batch_statistics(
    graphdef: nnx.GraphDef,
    recipe: Recipe,
    params: PyTree,
    batch_stats: PyTree,
    batch: PyTree,
    key: jax.Array,
) -> PyTree:
    """BatchNorm's means and variances over one training batch, in place of the running ones.

    With micro-batches they are the means of the micro-batches' own, which training normalises by.

    Args:
        graphdef: the model's structure, from `split_model`.
        recipe: what is fixed.
        params: parameters to compute them for.
        batch_stats: any finite ones of the same shapes.
        batch: `image` as in `train_step`. It gets lighting but no mixing, as in the authors' code.
        key: random key of the lighting.
    """
    images = batch["image"]

    def of_micro_batch(images, light):
        model = nnx.merge(graphdef, params, batch_stats)
        model.train()
        model.set_attributes(nnx.BatchNorm, momentum=0.0)
        model(normalize(images, recipe, light))
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    light = mixing.lighting(key, len(images), recipe.lighting_std)
    if recipe.accumulate == 1:
        return of_micro_batch(images, light)
    micro_batches = [_interleave(x, recipe.accumulate) for x in (images, light)]
    found = jax.lax.map(lambda xs: of_micro_batch(*xs), micro_batches)
    return jax.tree.map(lambda x: x.mean(axis=0), found)


def eval_step(
    graphdef: nnx.GraphDef, recipe: Recipe, params: PyTree, batch_stats: PyTree, batch: PyTree
) -> dict[str, jax.Array]:
    """Sums over a batch, exact in float32 up to 16 million examples.

    Args:
        graphdef: the model's structure, from `split_model`.
        recipe: what is fixed.
        params: parameters to evaluate.
        batch_stats: BatchNorm statistics to evaluate with.
        batch: `image`, `label` as in `train_step`, and `mask` bool `[N]`, False for padding.

    Returns:
        Number of examples, of top-1 and top-5 errors, and the sum of the cross-entropies.
    """
    model = nnx.merge(graphdef, params, batch_stats)
    model.eval()
    logits = model(normalize(batch["image"], recipe))
    labels, mask = batch["label"], batch["mask"]
    # top_k breaks ties by class number, so equal logits do not all count as right; but it takes
    # NaN for the largest, and a model that has diverged must not count as right by accident.
    _, best = jax.lax.top_k(logits, min(5, recipe.num_classes))
    hits = (best == labels[:, None]) & jnp.isfinite(logits).all(axis=-1, keepdims=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "examples": jnp.sum(mask, dtype=jnp.float32),
        "top1_errors": jnp.sum(mask & ~hits[:, 0], dtype=jnp.float32),
        "top5_errors": jnp.sum(mask & ~hits.any(axis=-1), dtype=jnp.float32),
        "loss_sum": jnp.sum(jnp.where(mask, losses, 0.0)),
    }


def normalize(images: jax.Array, recipe: Recipe, light: jax.Array | float = 0.0) -> jax.Array:
    """uint8 `[N, H, W, 3]` to float32 with the recipe's mean and standard deviation removed.

    `light`, `[N, 3]`, is first added to the colours of each image, in [0, 1].
    """
    mean, std = jnp.array(recipe.mean), jnp.array(recipe.std)
    shift = jnp.broadcast_to(light - mean, (len(images), 3))
    return (images.astype(jnp.float32) / 255 + shift[:, None, None]) / std


def _interleave(x: jax.Array, num: int) -> jax.Array:
    """`[N, ...]` to `[num, N / num, ...]`, taking every num-th row.

    Contiguous slices would each lie on a few devices only; every num-th row leaves an equal part
    of each micro-batch on every device.
    """
    return jnp.moveaxis(x.reshape(x.shape[0] // num, num, *x.shape[1:]), 1, 0)
