"""Times what a run does besides its training steps and between them, on the device here.

    python -m benchmarks.around_step --models vitc_1gf vitc_4gf vitc_18gf vitc_36gf

For each model, on random images that wait on the device: the time that normalising and mixing would
take by themselves, as a share of a training step (inside the step they are part of other kernels,
and take less); how long the host takes to dispatch a step, for which the device waits only if that
is longer than the step; images evaluated per second over images trained per second; how long a new
process takes to trace and compile the training step with an empty compilation cache, and another
with a full one; how much longer --steps training steps take after an asynchronous checkpoint of the
whole state was asked for. Mixing and evaluation take turns with training --repeats times; medians
are printed.
"""

from concurrent import futures
import contextlib
import multiprocessing
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import arguments
from benchmarks.jax_contenders import OURS, Training
from benchmarks.workload import Case
from convstem_jax import files, mixing
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.errors import first_line
from convstem_jax.models import MODELS
from convstem_jax.step import eval_step, model_inputs
from convstem_jax.terminal import positive

NUM_AHEAD = 3  # steps that the host can dispatch without waiting for one


def compile_seconds(model: str, num_images: int, cache: str) -> float:
    """Seconds to trace and compile the training step; one step is made, to see that it can be."""
    jax.config.update("jax_compilation_cache_dir", cache)
    training = Training.of(Case(model, OURS, num_images))
    given = training.state, next(training.batches), training.hparams
    start = time.perf_counter()
    step = training.step.lower(*given).compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(step(*given))
    return seconds


def measure(model: str, args) -> dict:
    """The row of a model, except for the compilation times."""
    training = Training.of(Case(model, OURS, args.batch))
    state, batches, sharding = training.state, training.batches, training.sharding
    batch = next(batches) | {"mask": jax.device_put(np.ones(args.batch, bool), sharding.batch)}
    key = jax.device_put(jax.random.key(0), sharding.replicated)
    evaluate = sharding.jit(eval_step, training.graphdef, training.recipe)
    prepare = sharding.jit(_prepare, training.recipe)

    def train_steps(num=args.steps):
        nonlocal state
        for _ in range(num):
            state, metrics = training.step(state, next(batches), training.hparams)
        return metrics

    def eval_steps():
        weights = state.ema["params"], state.ema["batch_stats"]
        return [evaluate(*weights, batch) for _ in range(args.steps)][-1]

    def prepare_steps():
        return [prepare(batch, key) for _ in range(args.steps)][-1]

    turns = (train_steps, eval_steps, prepare_steps)
    for turn in turns:
        jax.block_until_ready(turn())  # compiles
    seconds = np.array(
        [[_seconds(turn) / args.steps for turn in turns] for _ in range(args.repeats)]
    )
    hosts = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        metrics = train_steps(NUM_AHEAD)
        hosts.append((time.perf_counter() - start) / NUM_AHEAD)
        jax.block_until_ready(metrics)
    saves = []
    for _ in range(args.repeats + 1):
        step = int(state.step)
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.closing(Checkpoints(folder)) as checkpoints,
        ):
            start = time.perf_counter()
            checkpoints.save(step, state, {})
            called = time.perf_counter() - start
            jax.block_until_ready(train_steps())  # which may not overwrite what is not yet read
            saves.append((called, time.perf_counter() - start))
    about = {"model": model, "device": jax.devices()[0].device_kind, "batch": args.batch}
    # The first save compiles.
    return about | medians(*seconds.T, np.array(hosts), *np.transpose(saves[1:]), args.steps)


def medians(
    train: np.ndarray,
    evaluate: np.ndarray,
    mix: np.ndarray,
    host: np.ndarray,
    call: np.ndarray,
    save: np.ndarray,
    num_steps: int,
) -> dict[str, float]:
    """Medians of what was timed; each argument has the seconds of all repeats.

    Args:
        train: of a training step.
        evaluate: of an evaluation step.
        mix: of normalising and mixing by themselves.
        host: of dispatching a training step.
        call: of asking for a checkpoint.
        save: of that and the training steps after it.
        num_steps: how many training steps those are.
    """
    found = {
        "step_seconds": train,
        "host_seconds": host,
        "mixing_over_step": mix / train,
        "evaluation_over_training_rate": train / evaluate,
        "save_call_seconds": call,
        "save_blocks_seconds": save - num_steps * train,
    }
    return {name: float(np.median(values)) for name, values in found.items()}


def _prepare(recipe, batch, key):
    """What a training step does to its batch before the model, in the type that the model takes."""
    num, height, width, _ = batch["image"].shape
    light = mixing.lighting(key, num, recipe.lighting_std)
    alphas = {"mixup_alpha": recipe.mixup_alpha, "cutmix_alpha": recipe.cutmix_alpha}
    mask = mixing.draw_mask(key, height, width, **alphas)
    images, targets = model_inputs(recipe, batch | {"light": light}, mask)
    return images.astype(jnp.bfloat16), targets


def _seconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _in_a_new_process(function, *args):
    """What `function` returns in a new process, which has the device for itself, yet unused."""
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    headers = ("model", "device", "batch", "step (ms)", "host (ms)", "mixing alone (% of a step)")
    headers += ("evaluation over training rate", "compile, cold (s)", "warm (s)", "warm over cold")
    headers += ("save blocks (ms)", "in steps")
    lines = [
        (
            row["model"], row["device"], row["batch"],
            f"{1e3 * row['step_seconds']:,.1f}", f"{1e3 * row['host_seconds']:.2f}",
            f"{100 * row['mixing_over_step']:.1f}", f"{row['evaluation_over_training_rate']:.2f}",
            f"{row['cold_compile_seconds']:.1f}", f"{row['warm_compile_seconds']:.1f}",
            f"{row['warm_over_cold']:.2f}", f"{1e3 * row['save_blocks_seconds']:,.0f}",
            f"{row['save_blocks_seconds'] / row['step_seconds']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return arguments.table(headers, lines, num_text=2)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser("around_step", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["vitc_4gf"], choices=MODELS, metavar="MODEL",
        help="as in convstem_jax.create_model (default: vitc_4gf)")  # fmt: skip
    add("--batch", type=arguments.even, default=256, help="default: %(default)s; must be even")
    add("--steps", type=positive, default=20, help="in each turn (default: %(default)s)")
    add("--repeats", type=positive, default=5, help="default: %(default)s")
    args = parser.parse_args(argv)
    about = arguments.made_by(argv) | {"steps": args.steps, "repeats": args.repeats}
    rows = []
    for model in args.models:
        try:
            rows.append(_row(model, args))
        except Exception as error:  # from its processes; the other models go on
            print(f"left out: {model}: {first_line(error)}", file=sys.stderr, flush=True)
        if args.json:
            files.write_json(args.json, [row | about for row in rows])
    print(table(rows))
    return 0 if len(rows) == len(args.models) else 1


def _row(model: str, args) -> dict:
    print(f"{model}: compiling, twice", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as cache:
        given = compile_seconds, model, args.batch, cache
        cold, warm = _in_a_new_process(*given), _in_a_new_process(*given)
    print(f"{model}: {args.repeats} repeats", file=sys.stderr, flush=True)
    return _in_a_new_process(measure, model, args) | {
        "cold_compile_seconds": cold,
        "warm_compile_seconds": warm,
        "warm_over_cold": warm / cold,
    }


if __name__ == "__main__":
    sys.exit(main())
