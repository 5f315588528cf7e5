"""Errors that a user can act on, each with the exit status that launch scripts go by."""

from collections.abc import Iterator
import contextlib
import errno
import os

# What mounted buckets and network file systems say while they do not answer.
_PASSING = [
    os.strerror(code)
    for code in (errno.EIO, errno.EREMOTEIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)
]
_LACKING = ["RESOURCE_EXHAUSTED"] + [
    os.strerror(code)
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM)
]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def is_passing(error: BaseException) -> bool:
    """Whether an error says that storage did not answer, so that it is worth trying again.

    It goes by the text, since TensorStore turns an OSError into a ValueError with that text.
    """
    return any(text in str(cause) for cause in causes(error) for text in _PASSING)


def is_of_this_process(error: BaseException) -> bool:
    """Whether an error says that this process lacks memory, files to open or permission."""
    return any(
        isinstance(cause, MemoryError) or any(text in str(cause) for text in _LACKING)
        for cause in causes(error)
    )


def lacking(what: str, error: Exception) -> str:
    """The message for an error for which `is_of_this_process` is true."""
    return (
        f"{what} cannot be read by this process: give it more memory or open files, or the right "
        f"to read ({first_line(error)})"
    )


def first_line(error: Exception) -> str:
    """Type and first line of another library's error, which may be pages long."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


class UserError(Exception):
    """Base of the errors that `main` prints as one line instead of a traceback."""

    status = 1  # the exit status

    @property
    def exit_status(self) -> int:
        """`status`, but 75 if the cause is that storage did not answer."""
        return StorageError.status if is_passing(self) else self.status


class ConfigError(UserError):
    """A field, a flag or a folder is wrong: change it and run again."""

    status = 2


class DataError(UserError):
    """The data set is not what its own description says, or a record cannot be used."""

    status = 3


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit this configuration."""

    status = 4


class NotFiniteError(UserError):
    """The training loss, or a number of the state, became NaN or infinite."""

    status = 5


class Preempted(UserError):
    """Asked to stop; the state is saved, and the same command goes on from there."""

    status = 75


class UnreachableError(UserError):
    """Process 0 does not answer: perhaps it will, when the same command is given again."""

    status = 75


class StorageError(UserError):
    """Storage did not answer: the same command goes on from the last checkpoint."""

    status = 75


class PeerError(UserError):
    """Another process of the run failed in something that all of them do together."""

    def __init__(self, process: int, status: int):
        super().__init__(f"process {process} of the run failed: see the error that it printed")
        self.status = status


@contextlib.contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever another library raises while it reads data into a line for the user.

    Raises:
        ConfigError: this process lacks memory, files to open or permission.
        DataError: `what` is damaged; `remedy` says what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from ArrayRecord, zip files, NumPy
        if is_of_this_process(error):
            raise ConfigError(lacking(what, error)) from error
        raise DataError(f"{what} cannot be read: {first_line(error)}; {remedy}") from error


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turns an error in writing a file of the run into a line for the user.

    Raises:
        StorageError: the storage does not answer.
        CheckpointError: the storage is full, or the like.
    """
    try:
        yield
    except OSError as error:
        if is_passing(error):
            raise StorageError(
                f"{path} cannot be written now ({error}): the same command goes on from the last "
                "checkpoint"
            ) from error
        raise CheckpointError(
            f"{path} cannot be written ({error}): make room, and the same command goes on from the "
            "last checkpoint"
        ) from error
