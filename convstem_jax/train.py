"""The training loop, from a configuration to result.json."""

import contextlib
import dataclasses
import functools
import os
import time
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convstem_jax import (
    build,
    metrics,
    preemption,
    processes,
    profiling,
    provenance,
    run_folder,
    weights,
)
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.curves import plot_curves
from convstem_jax.data import pipeline, sources
from convstem_jax.errors import Preempted, UserError
from convstem_jax.evaluation import evaluate, precise_batch_stats
from convstem_jax.lead import Lead
from convstem_jax.models import MODELS
from convstem_jax.overview import print_overview
from convstem_jax.rules import validate
from convstem_jax.sharding import Sharding, room_left
from convstem_jax.step import batch_statistics, eval_step
from convstem_jax.transfer import transfer


def train(config: ml_collections.ConfigDict, workdir: str) -> dict:
    """Trains a model, or continues the run that `workdir` holds.

    Args:
        config: see configs/common.py.
        workdir: folder of the run; made if it is not there.

    Returns:
        What result.json holds.

    Raises:
        UserError: a wrong field, unusable data, a damaged checkpoint, a loss that is not finite,
            a request to stop, or storage that cannot be written.
    """
    # ------------------------------------------------------- checks, before anything is slow

    processes.check_same(
        config.to_json(),
        "has another configuration than process 0: give all processes the same command",
    )
    with processes.together():
        validate(config)
        train_split = sources.open_split(config.data_dir, config.dataset, config.train_split)
        eval_split = sources.open_split(config.data_dir, config.dataset, config.eval_split)
        sharding = Sharding(jax.devices(), config.state_sharding)
        build.check_batch(config, len(sharding.devices))
        recipe = build.recipe(config, train_split.num_classes)
        graphdef, new_state = build.new_state(config, recipe)
        data = {
            "train_examples": len(train_split),
            "eval_examples": len(eval_split),
            "num_classes": train_split.num_classes,
            "fingerprints": [train_split.fingerprint(), eval_split.fingerprint()],
            "architecture": dataclasses.asdict(MODELS[config.model]),
        }
    processes.check_same(
        str(data["fingerprints"]),
        f"has another {config.dataset} than process 0: copy the data anew to all machines",
    )
    workdir = run_folder.prepare(workdir, config, data, train_split.class_names)
    if (result := run_folder.read_result(workdir)) is not None:
        if processes.is_first():
            by = f" (commit {result['commit']})" if result.get("commit") else ""
            print(f"this run is finished{by}; its result:")
            _print_result(workdir, result)
        return result

    # ---------------------------------------------------------------------------------- data

    reading = pipeline.Reading.of(config)
    steps_per_epoch = len(train_split) / config.batch_size
    num_steps = build.num_steps(config, len(train_split))
    state_shapes = jax.eval_shape(new_state, jnp.uint32(config.seed))
    num_precise = 0
    if state_shapes.batch_stats:
        num_precise = build.num_precise_batches(config, len(train_split))

    new_train_batches = functools.partial(
        pipeline.train_batches,
        build.train_examples(config, train_split),
        batch_size=config.batch_size,
        sharding=sharding.batch,
        reading=reading,
    )
    eval_batches = pipeline.EvalBatches(
        build.eval_examples(config, eval_split),
        batch_size=config.eval_batch_size,
        sharding=sharding.batch,
        reading=reading,
    )

    precise_batches = []  # for BatchNorm's statistics; read before the first evaluation

    def read_precise_batches():
        # By threads: worker processes would hold their memory until the end of the run.
        num_threads = min(num_precise, max(1, reading.num_workers))
        threads = pipeline.Reading(0, num_threads, 1, 1)
        processes.print_once(
            f"before each evaluation {num_precise * config.batch_size:,} training images give "
            "BatchNorm's statistics (config.precise_bn_examples)"
        )
        precise_batches.extend(new_train_batches(numbers=range(num_precise), reading=threads))

    # -------------------------------------------------- checkpoints, or weights to start from

    def room():
        images_to_come = (num_precise - len(precise_batches)) * config.batch_size
        return room_left() - images_to_come * 3 * config.image_size**2 / len(sharding.devices)

    checkpoints = Checkpoints(
        os.path.join(workdir, "checkpoints"), keep=config.keep_checkpoints, room=room
    )
    latest_step = checkpoints.latest_step()
    processes.check_same(
        str(latest_step),
        f"does not see the checkpoints of --workdir {workdir} that process 0 sees: name a folder "
        "that looks the same from all machines, or wait until it does",
    )
    start_weights = None
    if config.init_from and latest_step is None:
        with processes.together():
            try:
                start_weights, start_model = weights.load(config.init_from)
            except UserError as error:
                raise type(error)(f"config.init_from: {error}") from error
        processes.check_same(
            str([start_model, *map(_checksum, jax.tree.leaves(start_weights))]),
            f"has other weights in {config.init_from} than process 0: "
            "copy them anew to all machines",
        )

    # ----------------------------------------------------------------------- model and state

    hparams = jax.device_put(build.hparams(config, len(train_split)), sharding.replicated)
    shardings = sharding.of_state(state_shapes)
    state = jax.jit(new_state, out_shardings=shardings)(hparams.seed)

    jit_train_step = build.jit_train_step(sharding, graphdef, recipe, shardings)
    replicated = {"out_shardings": sharding.replicated}
    jit_eval_step = sharding.jit(eval_step, graphdef, recipe, **replicated)
    jit_batch_statistics = sharding.jit(batch_statistics, graphdef, recipe, **replicated)
    if processes.is_first():
        print_overview(config, workdir, state, len(train_split), num_steps)

    # -------------------------------------------------------------------------------- resume

    first_step, before = latest_step or 0, {"seconds": 0.0, "speed": ()}
    if latest_step is not None:
        state, before = checkpoints.restore(state)
        processes.print_once(f"resumed from step {first_step}")
    elif start_weights is not None:
        same_classes = start_model.has_classes(train_split.class_names)
        started, table = transfer(start_weights, state.ema, same_classes=same_classes)
        started = jax.device_put(started, sharding.of_state(started))
        state = state._replace(**started, ema=jax.tree.map(jnp.copy, started))
        processes.print_once(f"from {config.init_from}:\n{table}")

    def precise(found):
        batch_stats = precise_batch_stats(jit_batch_statistics, found, precise_batches)
        return {"params": found["params"], "batch_stats": batch_stats}

    def evaluate_at(step):
        nonlocal state
        with records.pause(step, state):
            raw = {"params": state.params, "batch_stats": state.batch_stats}
            if num_precise:
                if not precise_batches:
                    read_precise_batches()
                raw = precise(raw)
                state = state._replace(batch_stats=raw["batch_stats"], ema=precise(state.ema))
            results = evaluate(jit_eval_step, {"ema": state.ema, "raw": raw}, eval_batches)
            records.eval(step, config.eval_split, results)
            return results

    def save(step, results=None):
        with records.pause(step, state):
            run_folder.claim(workdir)
            loop = {"seconds": time.perf_counter() - start, "speed": records.speed}
            checkpoints.save(step, state, loop, results and results["ema"])

    # ---------------------------------------------------------------------------------- loop

    results = step_metrics = None
    lead = Lead()
    steps = range(first_step + 1, num_steps + 1)
    with (
        preemption.stop_requested() as stop_requested,  # until the last checkpoint is written
        contextlib.closing(new_train_batches(numbers=range(first_step, num_steps))) as batches,
        contextlib.closing(eval_batches),
        # After the batches: their workers start while this loads TensorFlow.
        contextlib.closing(
            metrics.Records(
                workdir,
                first_step=first_step,
                num_steps=num_steps,
                steps_per_epoch=steps_per_epoch,
                batch_size=config.batch_size,
                speed=before["speed"],
            )
        ) as records,
        contextlib.closing(checkpoints),  # before the workers, which end one by one
        profiling.profiled(config.profile_step, steps, workdir, records.pause) as profile,
    ):
        start = time.perf_counter() - before["seconds"]
        for step in steps:  # after this one, `step` updates have been made
            profile(step, state)
            batch = next(batches)
            records.batch_arrived(step_metrics)
            # An implicit transfer between host and devices would stall every step.
            annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            with annotation, jax.transfer_guard("disallow"):
                state, step_metrics = jit_train_step(state, batch, hparams)
            lead.add(step_metrics)
            records.flush(wait=False)
            is_last = step == num_steps
            if step == 1 or step % config.log_every_steps == 0 or is_last:
                records.train(step, step_metrics)
            is_due = build.is_due(step, config.eval_every_epochs * steps_per_epoch) or is_last
            if is_due:
                results = evaluate_at(step)
            stopping = stop_requested()  # perhaps requested during the evaluation
            if is_due:
                save(step, results)
            elif step % config.checkpoint_every_steps == 0 or stopping:
                save(step)
            if stopping and not is_last:
                raise Preempted(
                    f"stopped at step {step} of {num_steps}, which is saved in {workdir}: "
                    "the same command goes on from there"
                )

        results = results or evaluate_at(num_steps)  # resumed after the last step

    # -------------------------------------------------------------------------------- result

    result = {
        "model": config.model,
        "dataset": f"{config.dataset}/{config.eval_split}",
        "top1_error": results["ema"]["top1_error"],
        "top5_error": results["ema"]["top5_error"],
        "raw_top1_error": results["raw"]["top1_error"],
        "examples": results["ema"]["examples"],
        "steps": num_steps,
        "seconds": round(time.perf_counter() - start, 1),
        "images_per_second": round(records.images_per_second, 1),
        "device": provenance.device(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    if processes.is_first():
        written = metrics.read_jsonl(os.path.join(workdir, "metrics.jsonl"))
        title = f"{config.model} on {result['dataset']}"
        plot_curves(os.path.join(workdir, "curves.png"), written, title)
        run_folder.write_result(workdir, result)
        _print_result(workdir, result)
    return result


def _checksum(x: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(x))


def _print_result(workdir: str, result: dict) -> None:
    print(
        f"\ntop-1 error {result['top1_error']:.2f} % on the {result['examples']:,} images of "
        f"{result['dataset']} (without EMA {result['raw_top1_error']:.2f} %), "
        f"after {result['seconds']:.0f} s\n"
        f"  result       {workdir}/result.json\n"
        f"  metrics      {workdir}/metrics.jsonl, or: tensorboard --logdir {workdir}\n"
        f"  curves       {workdir}/curves.png\n"
        f"  checkpoints  {workdir}/checkpoints",
        flush=True,
    )
