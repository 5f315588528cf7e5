"""A profile of a few training steps, for TensorBoard and XProf."""

from collections.abc import Callable, Iterator
import contextlib

import jax

from convstem_jax import processes
from convstem_jax.errors import first_line
from convstem_jax.step import PyTree

NUM_STEPS = 5


@contextlib.contextmanager
def profiled(
    first_step: int, steps: range, workdir: str, pause: Callable
) -> Iterator[Callable[[int, PyTree], None]]:
    """Profiles `NUM_STEPS` steps of a loop and what lies between them, on process 0's machine.

    If the profile cannot be written, this says so and disturbs nothing.

    Args:
        first_step: number of the first step to profile; 0 for no profile.
        steps: the steps of the loop inside the block. Where they end earlier, so does the profile.
        workdir: folder to write `plugins/profile` in.
        pause: `metrics.Records.pause`, since starting and writing are not training.

    Yields:
        A function to call before each step, with its number and the state before it.
    """
    running = False

    def stop() -> None:
        nonlocal running
        running = False
        if processes.is_first():
            try:
                jax.profiler.stop_trace()
            except RuntimeError as error:
                print(f"no profile, it cannot be written: {first_line(error)}", flush=True)
            else:
                print(f"profiled: tensorboard --logdir {workdir} (with xprof)", flush=True)

    def before_step(step: int, state: PyTree) -> None:
        nonlocal running
        if step != first_step + NUM_STEPS * running:
            return
        with pause(step - 1, state):
            if running:
                stop()
            else:
                running = True
                if processes.is_first():
                    jax.profiler.start_trace(workdir)

    if first_step and steps and first_step not in steps:
        processes.print_once(
            f"no profile: config.profile_step={first_step} is not one of the steps {steps.start} "
            f"to {steps.stop - 1}"
        )
    try:
        yield before_step
    finally:
        if running:
            stop()
