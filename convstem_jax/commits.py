"""Which checkpoints of a folder are whole: those that hold the file that Orbax writes last.

While a checkpoint is being deleted, that file may remain a little longer than others.
"""

import json
import os
import shutil

from convstem_jax.errors import CheckpointError, first_line

FILE = "commit_success.txt"  # scripts in launch/ look for it too


def whole(folder: str) -> set[int]:
    """Numbers of the whole checkpoints.

    Raises:
        OSError: the storage reports any error other than that a file is not there.
    """
    return {step for step in _steps(folder) if is_whole(folder, step)}


def is_whole(folder: str, step: int) -> bool:
    """Whether a checkpoint is there, and all of it.

    Raises:
        OSError: as from `whole`.
    """
    # Not by os.path.exists or Orbax: to them a file is not there, whatever error storage reports.
    try:
        os.stat(os.path.join(folder, str(step), FILE))
    except FileNotFoundError:
        return False
    return True


def remove_others(folder: str) -> None:
    """Removes what unfinished saves have left, as far as it can. Everything else stays.

    Raises:
        OSError: as from `whole`.
    """
    for step in _steps(folder) - whole(folder):
        path = os.path.join(folder, str(step))
        try:
            shutil.rmtree(path)
        except OSError as error:  # Orbax ignores it
            print(f"{path}, an unfinished checkpoint, stays: {first_line(error)}", flush=True)


def check_metrics(folder: str, steps: set[int]) -> None:
    """Checks the metrics of checkpoints: Orbax reads all at once, and does not name a bad one.

    Raises:
        CheckpointError: those of one are damaged.
        OSError: they cannot be read.
    """
    for step in steps:
        try:
            with open(os.path.join(folder, str(step), "metrics", "metrics")) as file:
                json.load(file)
        except FileNotFoundError:  # it was not evaluated
            pass
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {folder}/{step} is damaged: delete that folder (its metrics are no "
                "JSON)"
            ) from error


def _steps(folder: str) -> set[int]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return set()
    return {int(name) for name in names if name.isdecimal() and name == str(int(name))}
