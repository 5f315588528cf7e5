"""Runs the stability study, or continues an interrupted one, and writes its report."""

import contextlib
import functools
import os
import sys
import time

import jax

if __name__ == "__main__" and not os.environ.get("JAX_NUM_CPU_DEVICES"):
    # One trial on each core of a CPU; this does not affect other devices.
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))

from flax import nnx
import ml_collections
import numpy as np

from convstem_jax import build, command_line, files, preemption, provenance, run_folder
from convstem_jax.complexity import complexity
from convstem_jax.errors import ConfigError, writing
from convstem_jax.study import experiments
from convstem_jax.study.finished import read
from convstem_jax.study.optima import choose, known_optima
from convstem_jax.study.population import open_readers, open_splits, train_population
from convstem_jax.study.programs import Programs, trials_per_device
from convstem_jax.terminal import duration

_EPILOG = f"""\
examples:
  python -m convstem_jax.study                                   10 minutes on 2 CPU cores
  python -m convstem_jax.study --config configs/study.py:cpu     an hour or more
  python -m convstem_jax.study --config configs/study.py:full --workdir runs/study
  python -m convstem_jax.study --config configs/study.py:full,num_seeds=5

configs/study.py lists the fields. The same command run again continues where it was interrupted.

{command_line.EXIT_STATUS}"""


def study(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Trains all populations, the coarse grids first, and writes trials.jsonl.

    Args:
        config: see configs/study.py.
        workdir: folder of the study; made if it is not there.

    Raises:
        UserError: as from `train.train`.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"there are {jax.process_count()} processes: a study runs in one, with all its devices"
        )
    grids = experiments.grids(config)
    known = known_optima(config)
    centers = {(p.model, p.optimizer): config[f"{p.optimizer}_center"] for p in grids}
    later = experiments.populations(config, known | centers)  # for their sizes
    planned = [*grids, *later]
    runs = {(p.model, p.optimizer): experiments.run_config(config, p) for p in planned}
    train_split, eval_split = open_splits(config)
    data = {
        "train_examples": len(train_split),
        "eval_examples": len(eval_split),
        "fingerprints": [train_split.fingerprint(), eval_split.fingerprint()],
    }
    workdir = run_folder.prepare(workdir, config, data)
    if run_folder.read_result(workdir) is not None:
        print("this study is finished: only its report is written again")
        return _report(workdir)
    progress = _Progress(runs, planned)
    print(
        f"{len(planned)} populations, {sum(len(p.trials) for p in planned)} trials, "
        f"{len(train_split):,} training images, on {provenance.device()}",
        flush=True,
    )
    records = []
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(preemption.stop_requested())

        @functools.cache
        def readers(image_size, eval_resize):
            # Each image size has its own readers, so they share the memory.
            sizes = {(run.image_size, run.eval_resize): run for run in runs.values()}
            memory = config.host_memory_gb * 2**30 / len(sizes)
            return stack.enter_context(open_readers(sizes[image_size, eval_resize], memory))

        @functools.cache
        def programs(model, optimizer, per_device):
            memory = config.memory_gb * 2**30 or None
            return Programs(
                runs[model, optimizer], train_split.num_classes, per_device, memory=memory
            )

        def train(population):
            progress.start(population)
            pair = population.model, population.optimizer
            results = train_population(
                experiments.run_config(config, population),
                population.trials,
                os.path.join(workdir, "populations", population.name),
                readers=readers(runs[pair].image_size, runs[pair].eval_resize),
                new_programs=lambda num_trials: programs(*pair, trials_per_device(num_trials)),
                progress=progress.show,
                stop_requested=stop_requested,
            )
            progress.finish(population, results)
            about = {
                name: getattr(population, name) for name in ("kind", "model", "optimizer", "epochs")
            }
            records.extend(about | result for result in results)
            return results

        def search(grid):
            tried = train(grid)
            for _ in range(config.max_widenings):
                grid = experiments.widen(grid, tried)
                if grid is None:
                    break
                progress.add(grid)
                tried = tried + train(grid)
            return choose(tried)

        found = {(p.model, p.optimizer): search(p) for p in grids}
        for population in experiments.populations(config, known | found):
            train(population)

    path = os.path.join(workdir, "trials.jsonl")
    with writing(path):
        files.write_jsonl(path, records)
    # An interrupted study may have gone on elsewhere.
    devices, commits = (sorted({str(r[name]) for r in records}) for name in ("device", "commit"))
    run_folder.write_result(
        workdir,
        {
            "trials": len(records),
            "dataset": f"{config.dataset}/{config.eval_split}",
            **data,
            "seconds": round(sum(record["seconds"] for record in records), 1),
            "device": " and ".join(devices),
            "versions": provenance.versions(),
            "commit": " and ".join(commits),
        },
    )
    print(f"{len(records)} trials in {workdir}/trials.jsonl")
    _report(workdir)


def _report(workdir: str) -> None:
    try:
        from convstem_jax.study import report
    except ImportError as error:
        print(
            f"no report here: {error}. Where matplotlib and tabulate are installed: "
            f"python -m convstem_jax.study.report {workdir}"
        )
        return
    try:
        report.write(read([workdir]), os.path.join(workdir, "report"))
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error}") from error
    print(f"report: {workdir}/report/index.html")


class _Progress:
    """A line for each log point, with the share of all work done and the time left."""

    def __init__(self, runs, populations):
        @functools.cache
        def flops(model):
            run = next(run for run in runs.values() if run.model == model)
            return complexity(nnx.eval_shape(lambda: build.new_model(run, 10, 0))).flops

        self._flops = flops
        self._total = sum(map(self._work, populations))
        self._num, self._index = len(populations), 0
        self._done = self._before = 0.0  # in all, and in an earlier session
        self._start = time.perf_counter()

    def _work(self, population) -> float:
        return self._flops(population.model) * population.epochs * len(population.trials)

    def add(self, population) -> None:
        self._total += self._work(population)
        self._num += 1

    def start(self, population) -> None:
        self._population, self._index = population, self._index + 1
        self._is_trained = False

    def show(
        self, num_done: int, num_trials: int, first_share: float, share: float, losses: np.ndarray
    ) -> None:
        """Prints a line; `population.train_population` calls this and describes the arguments."""
        p = self._population
        each = self._work(p) / len(p.trials)
        if not self._is_trained:
            self._is_trained = True
            self._before += each * (num_done + num_trials * first_share)
        done = self._done + each * (num_done + num_trials * share)
        left = self.seconds / (done - self._before) * (self._total - done)
        loss = f"loss {np.median(losses):.3f}" if len(losses) else "all diverged"
        print(
            f"{self._index:3}/{self._num}  {p.name:36} {num_trials} trials at {share:4.0%}  "
            f"{loss}  {done / self._total:4.0%} of all, {duration(left)} left",
            flush=True,
        )

    def finish(self, population, results: list[dict]) -> None:
        if not self._is_trained:
            self._before += self._work(population)
        self._done += self._work(population)
        best = min(result["top1_error"] for result in results)
        diverged = sum(result["diverged_at"] is not None for result in results)
        print(
            f"{self._index:3}/{self._num}  {population.name:36} best top-1 error {best:.2f} %, "
            f"{diverged} of {len(results)} diverged",
            flush=True,
        )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def main(argv: list[str]) -> int:
    """Reads the command line and runs the study; returns the exit status."""
    return command_line.run(
        study,
        argv,
        name="convstem_jax.study",
        description=__doc__,
        epilog=_EPILOG,
        default_config="configs/study.py",
    )


if __name__ == "__main__":
    if "--traceback" not in sys.argv:
        command_line.silence_libraries()
    sys.exit(main(sys.argv[1:]))
