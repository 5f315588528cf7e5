"""The training loop, from a configuration to result.json."""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import threading
import time

from clu import parameter_overview
from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections

from convstem_jax import metrics, optim
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.data import pipeline, sources
from convstem_jax.errors import ConfigError, Preempted
from convstem_jax.evaluate import evaluate
from convstem_jax.models import create_model
from convstem_jax.step import HParams, Recipe, eval_step, init_state, split, train_step
from convstem_jax.validate import check_divides, validate

# Fields that may change when a run is resumed: no result depends on them.
_FREE_FIELDS = (
    "data_dir",
    "num_workers",
    "num_threads",
    "read_ahead",
    "prefetch",
    "eval_batch_size",
    "checkpoint_every_steps",
    "keep_checkpoints",
)


def train(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains a model, or goes on with the run that `workdir` holds.

    Args:
        config: see configs/common.py.
        workdir: folder of the run; made if it is not there.

    Returns:
        What result.json holds.

    Raises:
        UserError: a wrong field, unusable data, a damaged checkpoint, a loss that is not finite,
            or a request to stop.
    """
    ################################ Checks, before anything is slow ################################

    validate(config)
    workdir = os.path.abspath(os.path.expanduser(workdir))
    _prepare_workdir(config, workdir)
    train_split = sources.open_split(config.data_dir, config.dataset, config.train_split)
    eval_split = sources.open_split(config.data_dir, config.dataset, config.eval_split)

    ########################################### Devices ############################################

    num_devices = jax.device_count()
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    check_divides(
        "batch_size",
        config.batch_size,
        num_devices * config.accumulate,
        f"{num_devices} devices x {config.accumulate} micro-batches",
    )
    check_divides("eval_batch_size", config.eval_batch_size, num_devices, f"{num_devices} devices")

    ############################################# Data #############################################

    reading = pipeline.Reading(
        config.num_workers, config.num_threads, config.read_ahead, config.prefetch
    )
    steps_per_epoch = len(train_split) / config.batch_size
    num_steps = max(1, round(config.epochs * steps_per_epoch))

    def train_batches(first_step):
        return pipeline.train_batches(
            train_split,
            pipeline.TrainTransform(config.image_size, config.min_crop_area, config.flip),
            batch_size=config.batch_size,
            seed=config.seed,
            sharding=sharded,
            reading=reading,
            first_step=first_step,
        )

    def eval_batches():
        return pipeline.eval_batches(
            eval_split,
            resize=config.eval_resize,
            image_size=config.image_size,
            batch_size=config.eval_batch_size,
            sharding=sharded,
            # Starting processes costs seconds, for each evaluation anew.
            reading=dataclasses.replace(reading, num_workers=0, num_threads=16),
        )

    ######################################## Model and state ########################################

    recipe = Recipe(
        num_classes=train_split.num_classes,
        optimizer=config.optimizer,
        num_steps=num_steps,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        label_smoothing=config.label_smoothing,
        ema_rate=optim.ema_rate(
            alpha=config.ema_alpha,
            batch_size=config.batch_size,
            epochs=config.epochs,
            every=config.ema_every,
        ),
        ema_every=config.ema_every,
        mean=tuple(config.mean),
        std=tuple(config.std),
        accumulate=config.accumulate,
    )

    def new_model():
        return create_model(
            config.model,
            num_classes=train_split.num_classes,
            image_size=config.image_size,
            dtype=jnp.dtype(config.dtype),
            rngs=nnx.Rngs(config.seed),
        )

    try:
        graphdef, _, _ = split(nnx.eval_shape(new_model))
    except ValueError as error:
        raise ConfigError(
            f"{config.model} at config.image_size={config.image_size}: {error}"
        ) from error
    state = jax.jit(lambda: init_state(recipe, new_model()), out_shardings=replicated)()
    hparams = jax.device_put(HParams(jnp.float32(config.lr), jnp.float32(config.wd)), replicated)
    jitted_train_step = jax.jit(
        functools.partial(train_step, graphdef, recipe), donate_argnums=0, out_shardings=replicated
    )
    jitted_eval_step = jax.jit(
        functools.partial(eval_step, graphdef, recipe), out_shardings=replicated
    )
    if jax.process_index() == 0:
        _write_overview(workdir, state.params)
        num_params = sum(x.size for x in jax.tree.leaves(state.params))
        print(
            f"{config.model}: {num_params:,} parameters, {config.dtype}, on {num_devices} x "
            f"{jax.devices()[0].device_kind}; {len(train_split):,} training images, "
            f"{num_steps:,} steps of {config.batch_size}",
            flush=True,
        )

    ############################################ Resume ############################################

    checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"), keep=config.keep_checkpoints)
    first_step, seconds_before = 0, 0.0
    if checkpoints.latest_step() is not None:
        state, loop = checkpoints.restore(state)
        first_step, seconds_before = loop["next_batch"], loop["seconds"]
        print(f"resumed from step {first_step} of {workdir}", flush=True)
    records = metrics.Records(
        workdir,
        first_step=first_step,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        batch_size=config.batch_size,
    )

    ############################################# Loop #############################################

    start = time.perf_counter()
    results = None

    def evaluate_and_record(step):
        with records.pause():
            records.flush()
            weights = {
                "ema": state.ema,
                "raw": {"params": state.params, "batch_stats": state.batch_stats},
            }
            results = evaluate(jitted_eval_step, weights, eval_batches())
            records.eval(step, config.eval_split, results)
        return results

    def save(step, results=None):
        with records.pause():
            records.flush()  # a state whose loss is not finite must not be saved
            seconds = seconds_before + time.perf_counter() - start
            loop = {"next_batch": step, "seconds": seconds}
            checkpoints.save(
                step, state, loop, results and {"top1_error": results["ema"]["top1_error"]}
            )

    with _stop_signal() as stop:
        batches = train_batches(first_step)
        for step in range(first_step + 1, num_steps + 1):  # the update after which `step` are made
            batch = next(batches)
            # Whatever moves between host and devices unasked would stall every step.
            with jax.transfer_guard("disallow"):
                state, step_metrics = jitted_train_step(state, batch, hparams)
            if step == 1 or step % config.log_every_steps == 0 or step == num_steps:
                records.train(step, step_metrics)
            if _is_due(step, config.eval_every_epochs * steps_per_epoch) or step == num_steps:
                results = evaluate_and_record(step)
                save(step, results)
            elif step % config.checkpoint_every_steps == 0:
                save(step)
            if stop.is_set() and step < num_steps:
                save(step)
                checkpoints.close()
                records.close()
                raise Preempted(
                    f"stopped at step {step} of {num_steps}, which is saved in {workdir}: "
                    "the same command goes on from there"
                )

    ############################################ Result ############################################

    seconds = seconds_before + time.perf_counter() - start
    results = results or evaluate_and_record(num_steps)  # the run was complete before
    checkpoints.close()
    result = {
        "model": config.model,
        "top1_error": results["ema"]["top1_error"],
        "top5_error": results["ema"]["top5_error"],
        "raw_top1_error": results["raw"]["top1_error"],
        "examples": results["ema"]["examples"],
        "steps": num_steps,
        "seconds": round(seconds, 1),
        "images_per_second": round(records.images_per_second, 1),
        "device": f"{num_devices} x {jax.devices()[0].device_kind}",
        "versions": _versions(),
        "commit": _commit(),
    }
    records.close()
    if jax.process_index() == 0:
        _finish(config, workdir, records, result)
    return result


def _is_due(step: int, every: float) -> bool:
    """Whether `step` is the first at or after a multiple of `every`, which need not be whole."""
    return step // every > (step - 1) // every


def _prepare_workdir(config: ml_collections.ConfigDict, workdir: str) -> None:
    path = os.path.join(workdir, "config.json")
    new = json.loads(config.to_json())
    try:
        os.makedirs(workdir, exist_ok=True)
        if not os.access(workdir, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        if os.path.exists(path):
            with open(path) as file:
                _check_same(json.load(file), new, workdir)
        with open(path, "w") as file:
            json.dump(new, file, indent=2)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"--workdir {workdir} cannot be used: {error}; name another one"
        ) from error


def _check_same(old: dict, new: dict, workdir: str) -> None:
    differ = [
        f"{name} {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if name not in _FREE_FIELDS and old.get(name) != new.get(name)
    ]
    if differ:
        raise ConfigError(
            f"{workdir} holds a run of another configuration ({'; '.join(differ)}): "
            "name another --workdir, or delete that folder"
        )


def _write_overview(workdir: str, params) -> None:
    mask = optim.decay_mask(params)
    decayed = jax.tree.leaves_with_path(mask)
    lines = [
        f"{'yes' if yes else 'no ':3}  {jax.tree_util.keystr(path, simple=True, separator='/')}"
        for path, yes in decayed
    ]
    with open(os.path.join(workdir, "parameters.txt"), "w") as file:
        file.write(parameter_overview.get_parameter_overview(params, include_stats="global"))
        file.write("\n\nWeight decay acts on:\n" + "\n".join(lines) + "\n")
    print(
        f"weight decay acts on {sum(yes for _, yes in decayed)} of {len(decayed)} arrays "
        f"(listed in {os.path.join(workdir, 'parameters.txt')})"
    )


class _stop_signal:
    """Catches SIGTERM and SIGINT inside the block: the first one sets the event, a second kills."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()

        def handle(signum, frame):
            event.set()
            signal.signal(signum, self._old[signum])

        self._old = {}
        if threading.current_thread() is threading.main_thread():  # else Python refuses handlers
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._old[signum] = signal.signal(signum, handle)
        return event

    def __exit__(self, *unused):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in packages
    }


def _commit() -> str | None:
    """Commit of the code that ran, with "-dirty" where files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _finish(config, workdir: str, records: metrics.Records, result: dict) -> None:
    path = os.path.join(workdir, "result.json")
    with open(path + ".tmp", "w") as file:
        json.dump(result, file, indent=2)
    os.replace(path + ".tmp", path)
    curves = os.path.join(workdir, "curves.png")
    metrics.plot_curves(
        metrics.read_jsonl(records.path), curves, f"{config.model} on {config.dataset}"
    )
    print(
        f"\ntop-1 error {result['top1_error']:.2f} % on {result['examples']:,} images of "
        f"{config.dataset}/{config.eval_split} (without EMA {result['raw_top1_error']:.2f} %), "
        f"{result['seconds']:.0f} s\n"
        f"  result      {path}\n"
        f"  metrics     {records.path}  (or: tensorboard --logdir {workdir})\n"
        f"  curves      {curves}\n"
        f"  checkpoints {os.path.join(workdir, 'checkpoints')}",
        flush=True,
    )
