"""Which checkpoints of a folder are whole: those that hold the file that Orbax writes last."""

import os
import shutil

FILE = "commit_success.txt"  # scripts in launch/ look for it too


def whole(folder: str) -> set[int]:
    """Numbers of the whole checkpoints.

    Raises:
        OSError: the storage says anything but that a file is not there.
    """
    return {step for step in _steps(folder) if is_whole(folder, step)}


def is_whole(folder: str, step: int) -> bool:
    """Whether a checkpoint is there, and all of it.

    Raises:
        OSError: as from `whole`.
    """
    # Not os.path.exists, nor Orbax, for which a file is not there whatever storage answers.
    try:
        os.stat(os.path.join(folder, str(step), FILE))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_others(folder: str) -> None:
    """Removes what saves that were cut off have left. Other files and folders stay.

    Raises:
        OSError: as from `whole`, or one cannot be removed.
    """
    for step in _steps(folder) - whole(folder):
        shutil.rmtree(os.path.join(folder, str(step)))


def _steps(folder: str) -> set[int]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    return {int(name) for name in names if name.isdecimal() and name == str(int(name))}
