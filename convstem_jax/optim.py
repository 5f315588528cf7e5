"""The paper's optimisation (section 4 and appendix): AdamW, SGD, the schedule, the EMA.

The optimisers follow torch.optim, since the paper's learning rates and weight decays mean what
they mean there. Learning rate, weight decay and schedule are numbers or traced arrays, so that a
study can vary them inside one compiled program.
"""

import jax
import jax.numpy as jnp
import optax

from convstem_jax.models.target import num_devices, on_gpu

WARMUP_FACTOR = 0.1  # first learning rate of the warm-up, as a fraction of the base
FINAL_FACTOR = 0.005  # last learning rate of the cosine, as a fraction of the base


def decay_mask(params):
    """Tells which parameters the weight decay acts on.

    Biases and the gains of BatchNorm and LayerNorm are not decayed. The position embedding and
    the class token are: the authors' code exempts parameters by name, and these have no such name.

    Args:
        params: nested dict of parameters.

    Returns:
        The same tree with True where the parameter is decayed.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def adamw(lr, wd) -> optax.GradientTransformation:
    """AdamW whose decay is decoupled and multiplied by `lr`, as torch.optim.AdamW has it."""
    return optax.adamw(lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=wd, mask=decay_mask)


def sgd(lr, wd) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9 and coupled decay: `wd * param` joins the gradient."""
    return optax.chain(
        optax.add_decayed_weights(wd, mask=decay_mask),
        optax.sgd(lr, momentum=0.9, nesterov=True),
    )


OPTIMIZERS = {"adamw": adamw, "sgd": sgd}


def lr_factor(step, *, num_steps, warmup_steps):
    """Learning rate at `step` as a fraction of the base one.

    A half-period cosine over all `num_steps` from 1 to `FINAL_FACTOR`; during the first
    `warmup_steps` it is multiplied by a line from `WARMUP_FACTOR` to 1, as in the authors' code.
    Differs from the paper: changes at every step, not once an epoch.
    """
    # Optax's schedules take no traced lengths.
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * step / num_steps))
    progress = jnp.clip(step / jnp.maximum(warmup_steps, 1), 0, 1)
    warmup = jnp.where(warmup_steps, WARMUP_FACTOR + (1 - WARMUP_FACTOR) * progress, 1.0)
    return (FINAL_FACTOR + (1 - FINAL_FACTOR) * cosine) * warmup


def ema_rate(*, alpha: float, batch_size: int, epochs: float, every: int) -> float:
    """Share of the new weights in an EMA update, which happens every `every` steps.

    The authors scale `alpha` so that the average spans a fixed share of the training whatever the
    batch size and the length of the schedule.
    """
    return min(1.0, alpha * batch_size / epochs * every)


def update_ema(ema, new, step, *, rate, every: int, warmup_steps):
    """EMA of parameters or statistics after the update numbered `step` (from 0).

    Every `every` steps `ema` moves by `rate` towards `new`; during the warm-up it becomes `new`.
    Differs from the paper: the steps are counted over the run, not anew in each epoch.
    """
    rate = jnp.where(step < warmup_steps, 1.0, rate)

    def move():
        # At rate 1 the result is `new` to the last bit, even where `ema` is not finite.
        return jax.tree.map(
            lambda e, n: jnp.where(rate == 1, n, (1 - rate) * e + rate * n), ema, new
        )

    return jax.lax.cond(step % every == 0, move, lambda: ema)


def norm(tree) -> jax.Array:
    """Square root of the sum of all squares."""
    # On several devices arrays may be divided (fsdp), and a single sum would gather them.
    if not on_gpu() or num_devices() > 1:
        return optax.tree.norm(tree)
    # A separate sum for each array would take one to three small kernels. Without the barrier XLA
    # would split the single sum into them again.
    squares = [jnp.square(x).reshape(-1, x.shape[-1]) for x in jax.tree.leaves(tree)]
    rows = [x.sum(-1) if len(x) > 1 else x[0] for x in squares]
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(rows))))
