"""The folder of a run: whose it is, config.json, classes.txt and result.json."""

from collections.abc import Sequence
import contextlib
import fcntl
import json
import os
import secrets

import ml_collections

from convstem_jax import commits, processes
from convstem_jax.errors import ConfigError, first_line, writing
from convstem_jax.files import write, write_json

CLASSES = "classes.txt"
_TOKEN = ".token"  # its content is new at each start
_OWNER = ".owner"  # its content is new for each program that saves
# Fields that may change when a run is resumed: no result depends on them, except that
# `state_sharding` changes the order of sums and so their rounding.
FREE_FIELDS = (
    "data_dir",  # its content is compared
    "num_workers",
    "num_threads",
    "read_ahead",
    "prefetch",
    "eval_batch_size",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "profile_step",
    "state_sharding",
    "memory_gb",  # of a study
    "host_memory_gb",
)


def prepare(
    workdir: str,
    config: ml_collections.ConfigDict,
    data: dict,
    class_names: Sequence[str] = (),
) -> str:
    """Makes the folder, or checks that it holds a run of the same configuration and data.

    It writes config.json and classes.txt, and checks that all processes see them.

    Args:
        workdir: the folder.
        config: the configuration.
        data: what tells the data from others of the same names, such as sizes; JSON-serialisable.
        class_names: for classes.txt, which `convstem_jax.predict` reads.

    Returns:
        The folder's absolute path.

    Raises:
        ConfigError: it cannot be used, or belongs to another configuration.
    """
    described = json.loads(config.to_json()) | json.loads(json.dumps(data))
    with processes.together():
        if "://" in workdir:
            raise ConfigError(
                f"--workdir {workdir} is not a folder: mount the bucket and name that"
            )
        workdir = os.path.abspath(os.path.expanduser(workdir))
        # Orbax takes the first four for patterns, and would write what it could never read.
        if found := {"*", "?", "[", "\\", "\0"} & set(workdir):
            raise ConfigError(
                f"--workdir {workdir} cannot be used: its path has {min(found)!r}: name another"
            )
        with _usable(workdir):
            os.makedirs(workdir, exist_ok=True)
            if processes.is_first():
                _check_own(workdir)
                _lock(workdir)
            # With none of these there is nothing that could be mixed up.
            has_result = read_result(workdir) is not None
            if has_result or has_checkpoint(workdir) or _has_populations(workdir):
                old = _read(workdir, "config.json")
                _check_same(old, described, workdir)
                if "architecture" not in old:  # as of earlier versions: nobody knows
                    described.pop("architecture", None)
                _check_same_classes(class_names, workdir)
    token = ""
    with processes.together(), _usable(workdir):  # once all processes have read the old ones
        if processes.is_first():
            write_json(os.path.join(workdir, "config.json"), described)
            if class_names:
                text = "".join(f"{name}\n" for name in class_names)
                write(os.path.join(workdir, CLASSES), text)
            write(os.path.join(workdir, _TOKEN), secrets.token_hex())
    with contextlib.suppress(OSError), open(os.path.join(workdir, _TOKEN)) as file:
        token = file.read()
    processes.check_same(
        token,
        f"does not see what process 0 wrote in --workdir {workdir}: name a folder that all "
        "machines share",
    )
    return workdir


@contextlib.contextmanager
def _usable(workdir: str):
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--workdir {workdir} cannot be used: {error}; name another") from error


def _check_own(workdir: str) -> None:
    """Checks that a folder is new, or a run's: the program writes and deletes in it.

    Raises:
        ConfigError: it holds other files.
    """
    with os.scandir(workdir) as entries:
        names = {entry.name for entry in entries if not entry.name.startswith(".")}
    if "checkpoints" in names and "config.json" not in names:
        raise ConfigError(
            f"--workdir {workdir} holds checkpoints and no config.json: restore that file, which "
            "says whose they are, or name a new folder"
        )
    if names and "config.json" not in names:
        raise ConfigError(
            f"--workdir {workdir} holds other files ({min(names)}) and no run: name an empty or a "
            "new folder"
        )


_owned: dict[str, str] = {}  # folder -> what process 0 wrote to its _OWNER
_locks: dict[str, int] = {}  # folder -> open file


def _lock(workdir: str) -> None:
    """Keeps other programs out of the folder for as long as this one lives.

    Raises:
        ConfigError: another program has it.
    """
    path = os.path.join(workdir, ".lock")
    if workdir in _locks:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(_locks[workdir]), os.stat(path)):
                return
        os.close(_locks.pop(workdir))  # of a folder that was deleted
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.read(file, 20).decode() or "?"
        os.close(file)
        raise ConfigError(
            f"--workdir {workdir} is in use by process {pid}: stop that, or name another"
        ) from error
    except OSError:  # a file system without locks, such as a mounted bucket
        os.close(file)
        print(
            f"the file system of --workdir {workdir} has no locks: let no other run use it",
            flush=True,
        )
        return
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    _locks[workdir] = file


def claim(workdir: str) -> None:
    """Takes the folder at a program's first save, and checks at later ones that it still has it.

    Where locks are local to a machine, as for a bucket, they do not show a program on another one.

    Raises:
        ConfigError: another program has it.
    """
    with processes.together():
        if not processes.is_first():
            return
        path = os.path.join(workdir, _OWNER)
        if workdir not in _owned:
            with writing(path):
                write(path, own := secrets.token_hex())
            _owned[workdir] = own
            return
        with contextlib.suppress(OSError), open(path) as file:
            if file.read() != _owned[workdir]:
                raise ConfigError(
                    f"another run saves in --workdir {workdir}, perhaps on another machine: this "
                    "one ends and saves nothing more; once the other has ended, start it again"
                )


def has_checkpoint(workdir: str) -> bool:
    """Whether a run in the folder has saved something."""
    folder = os.path.join(workdir, "checkpoints")
    return bool(commits.whole(folder))


def _has_populations(workdir: str) -> bool:
    folder = os.path.join(workdir, "populations")  # of a study
    return os.path.isdir(folder) and bool(os.listdir(folder))


def _check_same(old: dict, new: dict, workdir: str) -> None:
    differ = [
        "the data have changed since"
        if name == "fingerprints"
        else f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
        for name in sorted((old.keys() | new.keys()) - {"architecture"})
        if name not in FREE_FIELDS and old.get(name) != new.get(name)
    ]
    if changes := changes_of_network(old, new):
        differ.append(f"of the network {changes}")
    if differ:
        raise ConfigError(
            f"{workdir} holds a run of another configuration ({'; '.join(differ)}): "
            "name another --workdir, or delete that folder"
        )


def changes_of_network(old: dict, new: dict) -> str:
    """How the sizes of the network in one config.json differ from those in another.

    The code may have changed meanwhile. A size that only one of them has counts for nothing.
    """
    old, new = (json.loads(json.dumps(x.get("architecture", {}))) for x in (old, new))
    names = [name for name in new if name in old and old[name] != new[name]]
    return ", ".join(f"{name} was {old[name]} and is {new[name]}" for name in names)


def read_classes(workdir: str) -> list[str]:
    """Names of the classes; an empty list where there is no such file, as in a study."""
    try:
        with open(os.path.join(workdir, CLASSES)) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{workdir}/{CLASSES} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{workdir}/{CLASSES} is damaged ({first_line(error)}): restore it, or delete it to "
            "use numbers"
        ) from error


def _check_same_classes(names: Sequence[str], workdir: str) -> None:
    """Checks that classes have the numbers that they had when the run began."""
    for i, (old, new) in enumerate(zip(read_classes(workdir), names, strict=False)):
        if old != new:
            raise ConfigError(
                f"{workdir} holds a run of other classes (class {i} is {old} there and {new} "
                "here): name another --workdir, or delete that folder"
            )


def write_result(workdir: str, result: dict) -> None:
    """Writes result.json."""
    path = os.path.join(workdir, "result.json")
    with writing(path):
        write_json(path, result)


def read_result(workdir: str) -> dict | None:
    """Reads result.json; None where the run is not finished."""
    if not os.path.exists(os.path.join(workdir, "result.json")):
        return None
    return _read(workdir, "result.json")


def _read(workdir: str, name: str) -> dict:
    path = os.path.join(workdir, name)
    try:
        with open(path) as file:
            found = json.load(file)
        if not isinstance(found, dict) or not found:
            raise ValueError(f"it holds {found!r:.100}")
        return found
    except ValueError as error:
        remedy = {
            "config.json": "restore it from where the folder was copied, or name another --workdir",
            "result.json": "delete it, and the same command goes on from the last checkpoint",
        }[name]
        raise ConfigError(f"{path} is damaged ({first_line(error)}): {remedy}") from error
