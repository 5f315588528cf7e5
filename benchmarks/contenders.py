"""Implementations of the training step, each in a process of its own, compiled and told to step."""

from collections.abc import Callable
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import sys
import time

# All processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

from benchmarks import jax_contenders, torch_contenders
from convstem_jax.errors import first_line
from convstem_jax.models import MODELS

JAX = jax_contenders.IMPLEMENTATIONS
OURS = JAX[0]
TORCH = ("torchvision", "timm")


class Contender:
    """An implementation of a model, in a process of its own.

    Args:
        model: a key of `MODELS`.
        implementation: of `JAX` or `TORCH`.
        batch: images of a step.
        args: of the command line.
    """

    def __init__(self, model: str, implementation: str, batch: int, args):
        self.model, self.implementation, self.batch = model, implementation, batch
        processes = multiprocessing.get_context("spawn")
        self.pipe, other = processes.Pipe()
        given = (other, model, implementation, batch, args)
        self._process = processes.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        other.close()
        self.compile_seconds, self.peak_bytes = None, None

    def __str__(self):
        return f"{self.implementation}, {self.model}"

    def compiled(self) -> None:
        """Waits until it is compiled and has made its first steps.

        Raises:
            RuntimeError: it failed.
        """
        self.compile_seconds, self.peak_bytes = self._answer()

    def seconds(self, num_steps: int) -> float:
        """Of that many steps, each.

        Raises:
            RuntimeError: a step failed, or the loss is not finite.
        """
        with contextlib.suppress(OSError):  # `_answer` tells of a process that is gone.
            self.pipe.send(num_steps)
        loss, seconds = self._answer()
        if not np.isfinite(loss):
            raise RuntimeError(f"its loss is {loss}")
        return seconds / num_steps

    def _answer(self) -> tuple:
        try:
            said = self.pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            status = self._process.exitcode
            raise RuntimeError(f"its process ended with status {status}") from error
        if isinstance(said, str):
            raise RuntimeError(said)
        return said

    def end(self) -> None:
        """Ends the process, which gives its memory back."""
        self._process.kill()
        self._process.join()


def _serve(pipe: connection.Connection, model: str, implementation: str, batch: int, args) -> None:
    """What a contender's process does: compiles, and makes steps whenever it is told how many."""
    size, rng = MODELS[model].image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    labels = rng.integers(0, torch_contenders.NUM_CLASSES, batch).astype(np.int32)
    given = (implementation, model, args.optimizer, images, labels)
    try:
        if implementation in JAX:
            step = jax_contenders.JaxStep.make(*given)
        else:
            step = torch_contenders.TorchStep.make(*given, args.torch_mode)
        step.run(3)
        pipe.send((step.compile_seconds, step.peak_bytes))
        while True:
            num_steps = pipe.recv()
            start = time.perf_counter()
            loss = step.run(num_steps)
            pipe.send((loss, time.perf_counter() - start))
    except Exception as error:  # The others go on without it.
        pipe.send(first_line(error))


def all_compiled(wanted: list[tuple], args, leave_out: Callable) -> list[Contender]:
    """Those of the contenders that compile, ready to be timed.

    Args:
        wanted: model, implementation and batch of each.
        args: of the command line.
        leave_out: is told of each of the others, and why.
    """
    start, num, found, busy = time.perf_counter(), len(wanted), [], []
    wanted = list(wanted)
    while wanted or busy:
        while wanted and len(busy) < args.at_once:
            busy.append(Contender(*wanted.pop(0), args))
        left = args.compile_limit and max(0, args.compile_limit - time.perf_counter() + start)
        ready = connection.wait([contender.pipe for contender in busy], left)
        if not ready:
            for contender in busy:
                contender.end()
                leave_out(contender, "it was not compiled in time")
            for model, implementation, _ in wanted:
                leave_out(f"{implementation}, {model}", "it was not compiled in time")
            break
        for contender in [x for x in busy if x.pipe in ready]:
            busy.remove(contender)
            try:
                contender.compiled()
            except RuntimeError as error:
                contender.end()
                leave_out(contender, error)
            else:
                found.append(contender)
                seconds = f"compiled in {contender.compile_seconds:.0f} s"
                print(f"{contender}: {seconds} ({len(found)} of {num})", file=sys.stderr)
    return found


def missing(model: str, implementation: str) -> str | None:
    """Why there is no such implementation of the model, if there is none."""
    if implementation in JAX:
        new = jax_contenders.new_model(implementation, model)
    elif reason := torch_contenders.unavailable(implementation):
        return reason
    else:
        new = torch_contenders.new_network(implementation, model)
    return None if new else "it has no such model"
