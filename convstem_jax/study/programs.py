"""Many trials of one model as one compiled program.

Trials differ in learning rate, weight decay and seed, which are arrays to `train_step`. They are
mapped over and sharded over the devices; all see the same batches.
"""

from collections.abc import Sequence
import functools
import math
import os
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import optax

from convstem_jax import build
from convstem_jax.errors import ConfigError
from convstem_jax.lead import AHEAD
from convstem_jax.sharding import bytes_of_program
from convstem_jax.step import (
    HParams,
    PyTree,
    Recipe,
    TrainState,
    batch_statistics,
    eval_step,
    train_step,
)
from convstem_jax.xla_options import compiler_options


class Trial(NamedTuple):
    """What tells a trial from the others of its population."""

    lr: float
    wd: float
    seed: int


class PopulationState(NamedTuple):
    """All that the training of a population carries from step to step; T trials."""

    step: jax.Array  # steps made so far, int32
    trials: TrainState  # each array with a leading axis [T]
    updates: jax.Array  # int32 [T]: fewer than `step` for those that diverged


def population_step(
    graphdef: nnx.GraphDef, recipe: Recipe, state: PopulationState, batch: PyTree, hparams: HParams
) -> tuple[PopulationState, dict[str, jax.Array]]:
    """One step of every trial on the same batch.

    A trial whose loss, parameters or statistics would not be finite has diverged: from then on it
    keeps the state that it had before, and with it the last error that could be measured.

    Args:
        graphdef: the model's structure, from `step.split_model`.
        recipe: what is fixed.
        state: before the step.
        batch: as for `train_step`.
        hparams: of all trials, arrays `[T]`.

    Returns:
        The state after it, and `train_step`'s metrics, each `[T]`.
    """

    def step(old, updates, hparams):
        new, metrics = train_step(graphdef, recipe, old, batch, hparams)
        # A gradient whose square is infinite makes AdamW's moments infinite.
        size = optax.tree.norm((new.params, new.batch_stats))
        size += metrics["loss"] + metrics["grad_norm"]
        is_alive = (updates == state.step) & jnp.isfinite(size)
        kept = jax.tree.map(lambda n, o: jnp.where(is_alive, n, o), new, old)
        return kept._replace(step=new.step), updates + is_alive, metrics

    trials, updates, metrics = jax.vmap(step)(state.trials, state.updates, hparams)
    return PopulationState(state.step + 1, trials, updates), metrics


def trials_per_device(num_trials: int) -> int:
    """How many of these trials each device trains at the same time, if it has the memory.

    On a CPU it is one: 4 at once take 1.2 (ViT_C) to 1.6 times (the CNN) as long there as one after
    another.
    """
    return 1 if jax.default_backend() == "cpu" else math.ceil(num_trials / jax.device_count())


class Programs:
    """The compiled functions of a population.

    Args:
        config: of the trials.
        num_classes: of the data.
        per_device: trials to train on each device at the same time; fewer where memory is short.
        devices: to share the trials among; by default all.
        memory: bytes of each device to use; by default nine tenths of what it has.

    Attributes:
        num_trials: trained at the same time by all devices.
        need: bytes that they take on each device.
        init, step, eval_step, batch_statistics: compiled, as the functions of `step.py` for each
            trial; the last only where precise statistics of BatchNorm are computed.
        by_trial, replicated: shardings of what is split by trial, and of what all trials share.

    Raises:
        ConfigError: the model's sizes do not fit together, or even one trial needs more memory.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        num_classes: int,
        per_device: int,
        *,
        devices: Sequence[jax.Device] | None = None,
        memory: float | None = None,
    ):
        devices = devices or jax.devices()
        recipe = build.recipe(config, num_classes)
        graphdef, new_state = build.new_state(config, recipe)
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((len(devices),), ("trial",), axis_types=auto, devices=devices)
        trials, all_devices = jax.P("trial"), jax.P()
        self.by_trial = jax.NamedSharding(mesh, trials)
        self.replicated = jax.NamedSharding(mesh, all_devices)
        state = PopulationState(all_devices, trials, trials)

        def jit(function, inputs, outputs=trials, **options):
            # Left to itself, the partitioner would gather mapped convolutions on every device.
            mapped = jax.shard_map(
                function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False
            )
            shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), inputs)
            options.setdefault("compiler_options", compiler_options(devices))
            return jax.jit(mapped, in_shardings=shardings, **options)

        def vmap(function, *in_axes):
            return jax.vmap(functools.partial(function, graphdef, recipe), in_axes=in_axes)

        def init(seeds):
            zeros = jnp.zeros(seeds.shape, jnp.int32)
            return PopulationState(jnp.zeros((), jnp.int32), jax.vmap(new_state)(seeds), zeros)

        # It runs once, and takes as long to compile as a step where LLVM optimises it.
        fast = {"xla_backend_optimization_level": 0} if devices[0].platform == "cpu" else {}
        self.init = jit(init, (trials,), state, compiler_options=fast)
        evaluate = jit(vmap(eval_step, 0, 0, None), (trials, trials, all_devices))
        statistics = jit(
            vmap(batch_statistics, 0, 0, None, None), (trials, trials, all_devices, all_devices)
        )
        step = jit(
            functools.partial(population_step, graphdef, recipe),
            (state, all_devices, trials),
            (state, trials),
            donate_argnums=0,
        )
        self._device = devices[0]
        memory = memory or 0.9 * _memory(self._device)

        def compile_for(per_device):
            """Compiles for that many trials per device; returns the bytes that they need."""
            self.num_trials = per_device * len(devices)
            shapes, eval_batch = self._shapes(config)
            ema = shapes[0].trials.ema
            self.step = step.lower(*shapes).compile()
            self.eval_step = evaluate.lower(ema["params"], ema["batch_stats"], eval_batch).compile()
            state_bytes = self.step.memory_analysis().alias_size_in_bytes
            need = max(bytes_of_program(self.step), bytes_of_program(self.eval_step) + state_bytes)
            bytes_of_image = 3 * config.image_size**2
            need += AHEAD * max(config.batch_size, config.eval_batch_size) * bytes_of_image
            if ema["batch_stats"] and config.precise_bn_examples:
                key = jax.eval_shape(lambda: jax.random.key(0))
                arguments = ema["params"], ema["batch_stats"], shapes[1], key
                self.batch_statistics = statistics.lower(*arguments).compile()
                need = max(need, bytes_of_program(self.batch_statistics) + state_bytes)
                # The batches for them stay on the device, at least one.
                need += max(config.precise_bn_examples, config.batch_size) * bytes_of_image
            return need

        while (need := compile_for(per_device)) > memory:
            if per_device == 1:
                raise ConfigError(
                    f"one trial of {config.model} needs {need / 2**30:.2f} GiB, and a device has "
                    f"{memory / 2**30:.2f}: lower config.batch_size and config.eval_batch_size, or "
                    "raise config.accumulate"
                )
            per_device = max(1, min(per_device - 1, int(per_device * memory / need)))
        self.need = need

    def room(self) -> float:
        """Bytes that each device has besides what the trials need."""
        return _memory(self._device) - self.need

    def _shapes(self, config):
        """Shapes of the step's arguments, and of an evaluation's batch."""

        def batch(num, **more):
            image = jax.ShapeDtypeStruct((num, config.image_size, config.image_size, 3), jnp.uint8)
            return {"image": image, "label": jax.ShapeDtypeStruct((num,), jnp.int32)} | more

        hparams = jax.eval_shape(
            lambda: stack_hparams(config, [Trial(0.0, 0.0, 0)] * self.num_trials, 1)
        )
        state = jax.eval_shape(self.init, hparams.seed)
        mask = jax.ShapeDtypeStruct((config.eval_batch_size,), jnp.bool_)
        step_arguments = state, batch(config.batch_size), hparams
        return step_arguments, batch(config.eval_batch_size, mask=mask)


def _memory(device: jax.Device) -> float:
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def stack_hparams(
    config: ml_collections.ConfigDict, trials: Sequence[Trial], num_examples: int
) -> HParams:
    """Hyper-parameters of all trials, arrays `[T]`."""
    same = build.hparams(config, num_examples)
    stacked = jax.tree.map(lambda x: jnp.full(len(trials), x), same)
    lr, wd, seed = (jnp.array(x) for x in zip(*trials, strict=True))
    return stacked._replace(
        lr=lr.astype(jnp.float32), wd=wd.astype(jnp.float32), seed=seed.astype(jnp.uint32)
    )
