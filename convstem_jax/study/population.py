"""Training of a population, in parts as large as memory allows, each of which can be resumed."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import glob
import json
import os
import shutil
import time

import jax
import ml_collections
import numpy as np

from convstem_jax import build, files, provenance
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.data import sources
from convstem_jax.data.reader import Reader
from convstem_jax.errors import Preempted, reading, writing
from convstem_jax.evaluation import evaluate, precise_batch_stats
from convstem_jax.lead import Lead
from convstem_jax.study.programs import Programs, Trial, stack_hparams

_PART = "part.json"  # [how many trials the state is for, the trials], beside the checkpoints


def open_splits(config: ml_collections.ConfigDict) -> tuple[sources.Split, sources.Split]:
    """Opens the training and the evaluation split.

    Raises:
        ConfigError: the data set is not there.
        DataError: it is damaged.
    """
    names = config.train_split, config.eval_split
    return tuple(sources.open_split(config.data_dir, config.dataset, name) for name in names)


@contextlib.contextmanager
def open_readers(
    config: ml_collections.ConfigDict, memory: float
) -> Iterator[tuple[Reader, Reader]]:
    """Yields the readers of training and of evaluation, for all populations of a configuration.

    Args:
        config: of the trials.
        memory: bytes of the host for batches that later populations see again.

    Raises:
        UserError: as `open_splits`.
    """
    train_split, eval_split = open_splits(config)
    reading = {"num_workers": config.num_workers, "read_ahead": config.read_ahead}
    examples = build.eval_examples(config, eval_split)
    size = config.eval_batch_size
    eval_reader = Reader(examples, batch_size=size, memory=memory, **reading)
    examples = build.train_examples(config, train_split)
    rest = max(0.0, memory - eval_reader.num_batches() * eval_reader.batch_bytes)
    train_reader = Reader(examples, batch_size=config.batch_size, memory=rest, **reading)
    with contextlib.closing(train_reader), contextlib.closing(eval_reader):
        yield train_reader, eval_reader


def train_population(
    config: ml_collections.ConfigDict,
    trials: Sequence[Trial],
    folder: str,
    *,
    readers: tuple[Reader, Reader],
    new_programs: Callable[[int], Programs],
    progress: Callable[[int, int, float, float, np.ndarray], None],
    stop_requested: Callable[[], bool],
) -> list[dict]:
    """Trains all trials whose results `folder` does not hold.

    Args:
        config: what the trials share; its lr, wd and seed are not used, but its `data_seed` is.
        trials: the trials.
        folder: absolute path, for results and checkpoints.
        readers: of training and of evaluation.
        new_programs: gives `Programs` for a number of trials; called only if some are missing.
        progress: called at log points with the number of trials done, the number in training, the
            share of their steps that an earlier session made, the share that is made by now, and
            the losses of those that have not diverged.
        stop_requested: tells, after each step, whether the machine asks to stop.

    Returns:
        For each trial: `lr`, `wd`, `seed`, `top1_error` in percent (EMA weights), `diverged_at`,
        a step or None, `curve`, a list of [epoch, error], `seconds`, its share of the time of
        those trained with it, compilation included, and what trained it: `device`, `commit`.

    Raises:
        UserError: as from `train`.
    """
    start = time.perf_counter()
    results = _read_results(folder)
    missing = [trial for trial in trials if trial not in results]
    part, num_together = _begun(folder, missing)
    programs = new_programs(num_together or len(missing)) if missing else None
    if part and programs.num_trials != num_together:
        print(
            f"{folder}: {num_together} trials were trained together, and here it would be "
            f"{programs.num_trials}: they start again",
            flush=True,
        )
        part = []
    while missing:
        goes_on, part = bool(part), part or missing[: programs.num_trials]
        name = f"{trials.index(part[0]):03}"
        part_folder = os.path.join(folder, name)
        if not goes_on:
            shutil.rmtree(part_folder, ignore_errors=True)
        with writing(part_folder):
            os.makedirs(part_folder, exist_ok=True)
            files.write_json(os.path.join(part_folder, _PART), [programs.num_trials, part])
        found = _train_part(
            config, part, part_folder, programs, readers,
            functools.partial(progress, len(trials) - len(missing), len(part)),
            stop_requested, start,
        )  # fmt: skip
        path = os.path.join(folder, f"trials_{name}.jsonl")
        with writing(path):
            files.write_jsonl(path, found)
        shutil.rmtree(part_folder, ignore_errors=True)
        missing = [trial for trial in missing if trial not in part]
        part = []
        start = time.perf_counter()
    results = _read_results(folder)
    return [results[trial] for trial in trials]


def _read_results(folder: str) -> dict[Trial, dict]:
    results = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "trials_*.jsonl")):
        with reading(path, "delete it, and its trials are trained again"), open(path) as file:
            for record in map(json.loads, file):
                results[Trial(record["lr"], record["wd"], record["seed"])] = record
    return results


def _begun(folder: str, missing: list[Trial]) -> tuple[list[Trial], int]:
    """Trials of an interrupted part, and how many trials its state is for; or none, and 0."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*", _PART)):
        folder_of_part = os.path.dirname(path)
        with reading(path, f"delete {folder_of_part}, and its trials begin again"):
            with open(path) as file:
                num_together, part = json.load(file)
            part = [Trial(*values) for values in part]
        if set(part) <= set(missing):
            return part, num_together
        shutil.rmtree(folder_of_part)  # its results were written just before the end
    return [], 0


def _train_part(
    config, trials, folder, programs, readers, progress, stop_requested, start
) -> list[dict]:
    """Trains as many trials as `programs` takes: `train.train` for a population."""
    train_reader, eval_reader = readers
    num_examples = len(train_reader.examples.split)
    padded = [*trials, *[trials[-1]] * (programs.num_trials - len(trials))]
    hparams = jax.device_put(stack_hparams(config, padded, num_examples), programs.by_trial)
    state = programs.init(hparams.seed)
    steps_per_epoch = num_examples / config.batch_size
    num_steps = build.num_steps(config, num_examples)
    num_precise = build.num_precise_batches(config, num_examples)

    checkpoints = Checkpoints(os.path.join(folder, "checkpoints"), keep=1, room=programs.room)
    curves, first_step = [], 0
    if checkpoints.latest_step() is not None:
        state, loop = checkpoints.restore(state)
        curves, first_step = loop["curves"], checkpoints.latest_step()
        start -= loop["seconds"]

    @functools.cache
    def precise_batches():
        return list(train_reader.read(range(num_precise), programs.replicated))

    def evaluate_trials(step):
        ema = state.trials.ema
        if num_precise and ema["batch_stats"]:
            precise = precise_batch_stats(programs.batch_statistics, ema, precise_batches())
            ema = ema | {"batch_stats": precise}
        batches = eval_reader.read(range(eval_reader.num_batches()), programs.replicated)
        errors = evaluate(programs.eval_step, {"ema": ema}, batches)["ema"]["top1_error"]
        is_alive = jax.device_get(state.updates) == step
        before = curves[-1][1] if curves else [100.0] * len(trials)
        kept = [
            error if alive else last
            for error, alive, last in zip(errors, is_alive, before, strict=False)
        ]
        curves.append([round(step / steps_per_epoch, 4), kept])

    def save(step):
        loop = {"curves": curves, "seconds": time.perf_counter() - start}
        checkpoints.save(step, state, loop)

    lead = Lead()
    batches = train_reader.read(range(first_step, num_steps), programs.replicated)
    with contextlib.closing(checkpoints):
        for step, batch in enumerate(batches, first_step + 1):
            with jax.transfer_guard("disallow"):
                state, metrics = programs.step(state, batch, hparams)
            lead.add(metrics)
            is_last, stopping = step == num_steps, stop_requested()
            if build.is_due(step, config.eval_every_epochs * steps_per_epoch) or is_last:
                evaluate_trials(step)
            if step % config.log_every_steps == 0 or is_last:
                losses, updates = jax.device_get((metrics["loss"], state.updates))
                losses = losses[: len(trials)][updates[: len(trials)] == step]
                progress(first_step / num_steps, step / num_steps, losses)
            if is_last:
                break
            if stopping or step % config.checkpoint_every_steps == 0:
                save(step)
            if stopping:
                raise Preempted(
                    f"stopped at step {step} of {num_steps}, which is saved in {folder}: the same "
                    "command goes on from there"
                )
    updates = jax.device_get(state.updates)
    about = {
        "seconds": round((time.perf_counter() - start) / len(trials), 2),
        "device": provenance.device(),
        "commit": provenance.commit(),
    }
    return [
        trial._asdict()
        | {
            "top1_error": curves[-1][1][i],
            "diverged_at": None if updates[i] == num_steps else int(updates[i]) + 1,
            "curve": [[epoch, errors[i]] for epoch, errors in curves],
        }
        | about
        for i, trial in enumerate(trials)
    ]
