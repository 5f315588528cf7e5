"""A profile of a few training steps, for TensorBoard and XProf."""

from collections.abc import Callable, Iterator
import contextlib

import jax

from convstem_jax import processes
from convstem_jax.step import PyTree

NUM_STEPS = 5


@contextlib.contextmanager
def profiled(first_step: int, workdir: str) -> Iterator[Callable[[int, PyTree], None]]:
    """Profiles `NUM_STEPS` steps of a loop, and what lies between them.

    Args:
        first_step: number of the first of them; 0 for none.
        workdir: folder to write `plugins/profile` in.

    Yields:
        A function to call before each step, with its number and the state before it. Where the
        block ends earlier, the profile does too.
    """
    running = contextlib.ExitStack()

    def before_step(step: int, state: PyTree) -> None:
        if step not in (first_step, first_step + NUM_STEPS) or not first_step:
            return
        jax.block_until_ready(state)  # of the steps before
        running.close()
        if step == first_step:
            message = f"profiled from step {step}: tensorboard --logdir {workdir} (with xprof)"
            running.callback(processes.print_once, message)
            running.enter_context(jax.profiler.trace(workdir))

    with running:
        yield before_step
