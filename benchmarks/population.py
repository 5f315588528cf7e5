"""Times a population of trials against the same runs one after another.

    python -m benchmarks.population                        16 trials of vitc_tiny
    python -m benchmarks.population --trials 64 --batch_size 256 --json population.json

Both train on the embedded data, without compiling or decoding: the batches wait in memory. A run
is timed once and counted --trials times. Repeats alternate between the two; medians are printed,
and the seconds of decoding for one part of the population and for all parts.
"""

import functools
import os
import sys
import time

import jax

if __name__ == "__main__" and not os.environ.get("JAX_NUM_CPU_DEVICES"):
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))  # as the study does

import numpy as np
from tabulate import tabulate

from benchmarks import arguments
from convstem_jax import build, files, provenance
from convstem_jax.config import load_config
from convstem_jax.models import MODELS
from convstem_jax.sharding import Sharding
from convstem_jax.study.experiments import Population, run_config
from convstem_jax.study.population import open_readers
from convstem_jax.study.programs import Programs, Trial, stack_hparams, trials_per_device
from convstem_jax.terminal import positive


def time_population(config, readers, programs, trials, steps) -> float:
    """Seconds of some steps of all trials, in as many parts as it takes."""
    start, num_examples = time.perf_counter(), len(readers[0].examples.split)
    for first in range(0, len(trials), programs.num_trials):
        part = trials[first : first + programs.num_trials]
        part += part[-1:] * (programs.num_trials - len(part))
        hparams = jax.device_put(stack_hparams(config, part, num_examples), programs.by_trial)
        state = programs.init(hparams.seed)
        for batch in readers[0].read(range(steps), programs.replicated):
            state, metrics = programs.step(state, batch, hparams)
        jax.block_until_ready(metrics)
    return time.perf_counter() - start


def time_run(config, readers, step, new_state, steps) -> float:
    """Seconds of some steps of one trial."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    start = time.perf_counter()
    hparams = build.hparams(config, len(readers[0].examples.split))
    state = new_state(hparams.seed)
    for batch in readers[0].read(range(steps), device):
        state, metrics = step(state, batch, hparams)
    jax.block_until_ready(metrics)
    return time.perf_counter() - start


def time_reading(config, num_populations, steps) -> float:
    """Seconds in which that many populations, one after another, read their batches."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with open_readers(config, memory=1e9) as (reader, _):
        start = time.perf_counter()
        for _ in range(num_populations):
            for batch in reader.read(range(steps), device):
                jax.block_until_ready(batch)
        return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser("population", __doc__)
    add = parser.add_argument
    add("--model", default="vitc_tiny", choices=MODELS, metavar="MODEL",
        help="as in convstem_jax.create_model (default: %(default)s)")  # fmt: skip
    add("--optimizer", default="sgd", choices=("adamw", "sgd"), help="default: %(default)s")
    add("--trials", type=positive, default=16, help="default: %(default)s")
    add("--batch_size", type=positive, default=64, help="default: %(default)s")
    add("--steps", type=positive, default=50, help="of each trial (default: %(default)s)")
    add("--repeats", type=positive, default=5, help="default: %(default)s")
    args = parser.parse_args(argv)

    config = load_config(f"configs/study.py:batch_size={args.batch_size},train_split=train")
    trials = tuple(Trial(0.01 + 0.001 * i, 1e-4, i) for i in range(args.trials))
    config = run_config(config, Population("seeds", args.model, args.optimizer, 3.0, trials))
    programs = Programs(config, 10, trials_per_device(args.trials))

    recipe = build.recipe(config, 10)
    graphdef, new_state = build.new_state(config, recipe)
    sharding = Sharding(jax.devices()[:1])
    shardings = sharding.of_state(jax.eval_shape(new_state, 0))
    step = build.jit_train_step(sharding, graphdef, recipe, shardings)
    new_state = jax.jit(new_state, out_shardings=shardings)

    with open_readers(config, memory=1e9) as readers:
        whole = functools.partial(time_population, config, readers, programs, trials)
        one = functools.partial(time_run, config, readers, step, new_state)
        whole(2)  # compile
        one(2)
        whole(args.steps)  # and read
        pairs = [(whole(args.steps), one(args.steps)) for _ in range(args.repeats)]
    parts = -(-args.trials // programs.num_trials)
    reading = {
        n: np.median([time_reading(config, n, args.steps) for _ in range(3)]) for n in (1, parts)
    }
    population_s, run_s = np.median(pairs, axis=0)
    row = {
        "device": provenance.device(),
        "model": args.model,
        "trials": args.trials,
        "trials_at_a_time": programs.num_trials,
        "batch": args.batch_size,
        "population_seconds": round(float(population_s), 3),
        "runs_seconds": round(float(run_s * args.trials), 3),
        "ratio": round(float(np.median([p / (args.trials * r) for p, r in pairs])), 3),
        "reading_seconds_one_part": round(float(reading[1]), 3),
        "reading_seconds": round(float(reading[parts]), 3),
    }
    print(tabulate(row.items(), tablefmt="plain"))
    if args.json:
        about = arguments.made_by(argv) | {"steps": args.steps, "repeats": args.repeats}
        files.write_json(args.json, [row | about])
    return 0


if __name__ == "__main__":
    sys.exit(main())
