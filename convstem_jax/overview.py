"""What a run prints before its first step, and its file parameters.txt."""

import math
import os

import jax
import ml_collections

from convstem_jax import provenance
from convstem_jax.errors import writing
from convstem_jax.optim import decay_mask
from convstem_jax.sharding import bytes_on_device
from convstem_jax.step import PyTree, TrainState, by_name


def print_overview(
    config: ml_collections.ConfigDict,
    workdir: str,
    state: TrainState,
    num_images: int,
    num_steps: int,
) -> None:
    """Prints what is trained and for how long, and warns of unusual settings.

    Raises:
        CheckpointError, StorageError: parameters.txt cannot be written.
    """
    params = state.params
    decayed = decay_mask(params)
    path = _write_parameters(workdir, params, decayed)
    flags = jax.tree.leaves(decayed)
    paths = jax.tree.leaves_with_path(decayed)
    exempt = ", ".join(sorted({path[-1].key for path, is_decayed in paths if not is_decayed}))
    if num_images < config.batch_size:
        print(
            f"each batch has images more than once: config.batch_size={config.batch_size:,} is "
            f"more than the {num_images:,} training images"
        )
    if (age := (num_steps - 1) % config.ema_every) > num_steps / 10:
        print(
            f"the errors are those of the EMA, whose last update is {age} steps before the end of "
            f"{num_steps}: lower config.ema_every={config.ema_every}"
        )
    # The rates of a run's EMA updates add up to this, whatever its batch size and epochs.
    if (moved := config.ema_alpha * num_images) < 3:
        print(
            f"at the end the EMA is still {math.exp(-moved):.0%} what it was after the warm-up: "
            f"config.ema_alpha={config.ema_alpha:g} is for more training images; "
            f"{12.8 / num_images:.2g} is the paper's for {num_images:,}"
        )
    print(
        f"{config.model}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, "
        f"{config.dtype}, on {provenance.device()}\n"
        f"the state, {config.state_sharding}, takes {bytes_on_device(state) / 2**20:,.1f} MiB of "
        "each device\n"
        f"weight decay acts on {sum(flags)} of {len(flags)} arrays, on none called {exempt}: see "
        f"{path}\n"
        f"{num_images:,} training images, {num_steps:,} steps of {config.batch_size}\n"
        f"compiling; then a line every {config.log_every_steps} steps",
        flush=True,
    )


def _write_parameters(workdir: str, params: PyTree, decayed: PyTree) -> str:
    """Writes the parameters and the decay mask to parameters.txt, and returns its path."""
    from clu import parameter_overview

    path = os.path.join(workdir, "parameters.txt")
    with writing(path), open(path, "w") as file:
        # Means and deviations of split parameters would need the other processes.
        stats = "global" if jax.process_count() == 1 else False
        file.write(parameter_overview.get_parameter_overview(params, include_stats=stats))
        file.write("\n\nWeight decay acts on\n")
        for name, yes in by_name(decayed).items():
            file.write(f"{'yes' if yes else 'no':4}{name}\n")
    return path
