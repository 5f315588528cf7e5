"""Implementations of the training step, each in a process of its own, compiled and told to step."""

from collections.abc import Callable, Sequence
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import sys
import threading
import time

# All processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# What an earlier run compiled must not be reused.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import jax
import numpy as np

from benchmarks import jax_contenders, torch_contenders
from benchmarks.workload import Case
from convstem_jax.errors import first_line

JAX = jax_contenders.IMPLEMENTATIONS
TORCH = ("torchvision", "timm")


class Contender:
    """An implementation of a model, in a process of its own.

    On TPUs, which only one process can open, it is a thread of this one.
    """

    def __init__(self, case: Case):
        self.case = case
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self._is_thread = jax.default_backend() == "tpu"
        kind = threading.Thread if self._is_thread else spawn.Process
        self._runner = kind(target=_serve, args=(other, case), daemon=True)
        self._runner.start()
        if not self._is_thread:
            other.close()
        self.compile_seconds, self.peak_bytes = None, None

    def compiled(self) -> None:
        """Waits until it is compiled and has made its first steps.

        Raises:
            RuntimeError: it failed.
        """
        self.compile_seconds, self.peak_bytes = self._answer()

    def seconds(self, num_steps: int) -> float:
        """Seconds per step of that many steps, after one that is not counted.

        Raises:
            RuntimeError: a step failed, or the loss is not finite.
        """
        with contextlib.suppress(OSError):  # `_answer` reports a process that is gone.
            self.pipe.send(num_steps)
        loss, seconds = self._answer()
        if not np.isfinite(loss):
            raise RuntimeError(f"its loss is {loss}")
        return seconds / num_steps

    def _answer(self) -> tuple:
        try:
            said = self.pipe.recv()
        except (EOFError, OSError) as error:
            self._runner.join()
            status = self._runner.exitcode
            raise RuntimeError(f"its process ended with status {status}") from error
        if isinstance(said, str):
            raise RuntimeError(said)
        return said

    def end(self) -> None:
        """Ends it, which frees its memory."""
        self.pipe.close()
        if not self._is_thread:
            self._runner.kill()
        self._runner.join()


def _serve(pipe: connection.Connection, case: Case) -> None:
    """What a contender does: compiles, and makes steps whenever it is told how many."""
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        in_jax = case.implementation in JAX
        step = (jax_contenders.JaxStep if in_jax else torch_contenders.TorchStep)(case)
        pipe.send((step.compile_seconds, step.peak_bytes))
        while True:
            num_steps = pipe.recv()
            step.run(1)  # The device has waited for the others.
            start = time.perf_counter()
            loss = step.run(num_steps)
            pipe.send((loss, time.perf_counter() - start))
    except Exception as error:  # The others go on without it.
        with contextlib.suppress(OSError):  # It was told to end.
            pipe.send(first_line(error))


def all_compiled(cases: Sequence[Case], overlap: int, leave_out: Callable) -> list[Contender]:
    """The contenders that compile, ready to be timed.

    Args:
        cases: of the contenders.
        overlap: how many of JAX's to compile at once, and as many of PyTorch's at the same time; 0
            for one at a time.
        leave_out: called with the case of each that fails, and the reason.
    """
    found, busy = [], []
    beside = [case for case in cases if overlap and case.implementation in TORCH]
    queues = [[case for case in cases if case not in beside], beside]
    while busy or any(queues):
        for queue in queues:
            while queue and sum(queue is x for x, _ in busy) < max(1, overlap):
                busy.append((queue, Contender(queue.pop(0))))
        ready = connection.wait([contender.pipe for _, contender in busy])
        for contender in [contender for _, contender in busy if contender.pipe in ready]:
            busy = [x for x in busy if x[1] is not contender]
            try:
                contender.compiled()
            except RuntimeError as error:
                contender.end()
                leave_out(contender.case, error)
            else:
                found.append(contender)
                what = f"{contender.case}: compiled in {contender.compile_seconds:.0f} s"
                print(f"{what} ({len(found)} of {len(cases)})", file=sys.stderr)
    return found


def missing(model: str, implementation: str) -> str | None:
    """Why there is no such implementation of the model; None if there is one."""
    if implementation in JAX:
        new = jax_contenders.new_model(implementation, model)
    elif reason := torch_contenders.unavailable(implementation):
        return reason
    else:
        new = torch_contenders.new_network(implementation, model)
    return None if new else "it has no such model"
