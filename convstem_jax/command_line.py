"""The command line of a program that reads a configuration: flags, errors, exit status."""

import argparse
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
import logging as python_logging
import os
import re
import signal
import sys
import traceback

from absl import logging
import jax
import ml_collections

from convstem_jax import processes
from convstem_jax.config import load_config, set_fields, split_argument
from convstem_jax.errors import ConfigError, StorageError, UserError, first_line, is_passing
from convstem_jax.run_folder import FREE_FIELDS
from convstem_jax.terminal import new_parser, outlive_readers, tell

EXIT_STATUS = """\
exit status:
  0 done · 2 configuration, or no such data · 3 damaged data · 4 checkpoint · 5 not finite
  75 asked to stop, and saved; another process was lost; storage did not answer: run it again
  130 interrupted
"""
# Grain's message, where a signal comes before the worker can ignore it.
_LOST_WORKER = re.compile(r"Worker process was terminated unexpectedly with exit code -(\d+)")
_OVERRIDE = re.compile(r"--config\.([^=]+)(=?)(.*)", re.DOTALL)


@outlive_readers()
def run(
    program: Callable[[ml_collections.ConfigDict, str], object],
    argv: list[str],
    *,
    name: str,
    description: str,
    epilog: str,
    default_config: str | None = None,
    several_processes: bool = False,
) -> int:
    """Reads the command line and runs `program(config, workdir)`; returns the exit status.

    Args:
        program: raises UserError for what the user can act on: one line, not a traceback.
        argv: the arguments, without the program's name.
        name: the module's name, as after `python -m`.
        description: beginning of --help.
        epilog: end of --help.
        default_config: default of --config, which must be given if this is None.
        several_processes: whether the program may be one of several that work together.
    """
    parser = new_parser(name, description, epilog=epilog, allow_abbrev=False)
    _add_arguments(parser, default_config, several_processes)
    args, overrides = parse(parser, argv)
    try:
        if several_processes:  # first, since a configuration file may use JAX
            processes.start(args.coordinator, args.processes, args.process)
        config = load_config(args.config)
        set_fields(config, overrides)
        keep_programs(args.compilation_cache)
        program(config, args.workdir or default_workdir(args.config, overrides))
    except UserError as error:
        if args.traceback:
            traceback.print_exc()
        return tell(error)
    except (RuntimeError, ValueError, OSError) as error:
        reason = first_line(error)[:1000]
        is_lost_peer = processes.is_lost_peer(error)
        by_signal = _LOST_WORKER.search(str(error))
        lost_worker = by_signal or isinstance(error, BrokenProcessPool)  # as in a study
        no_memory = "RESOURCE_EXHAUSTED" in reason
        if not (no_memory or is_lost_peer or lost_worker or is_passing(error)):
            raise
        if args.traceback:
            traceback.print_exc()
        if no_memory:
            first = "set config.state_sharding=fsdp, which a run may change, " * several_processes
            print(
                f"error: the devices have too little memory: {first}raise config.accumulate, lower "
                f"config.batch_size or take more devices ({reason})",
                file=sys.stderr,
            )
            return ConfigError.status
        what = "another process of the run was lost" if is_lost_peer else "storage did not answer"
        if lost_worker:
            what = "a process that reads the data was ended"
            what += f" by signal {by_signal[1]}" if by_signal else ""
            if not by_signal or int(by_signal[1]) in (signal.SIGBUS, signal.SIGKILL):
                what += ", perhaps because memory or /dev/shm is full (lower config.num_workers or "
                what += "config.read_ahead, which a run may change)"
        print(
            f"{what}: the same command goes on from the last checkpoint ({reason})",
            file=sys.stderr,
        )
        return StorageError.status
    except KeyboardInterrupt:
        print("interrupted: what was saved before is kept", file=sys.stderr)
        return 130
    return 0


def keep_programs(folder: str | None = None) -> None:
    """Keeps compiled programs between runs, in `folder`: the value of `--compilation_cache`."""
    if folder is None:
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/convstem_jax")
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder) or None)
    # Small programs too: together they take seconds to compile, and 0.1 MB.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _add_arguments(
    parser: argparse.ArgumentParser, default_config: str | None, several_processes: bool
) -> None:
    parser.add_argument(
        "--config", required=default_config is None, default=default_config, metavar="FILE[:ARG]",
        help="configuration file, with its argument after a colon"
        + (f" (default: {default_config})" if default_config else ": configs/vitc.py:18gf,sgd"),
    )  # fmt: skip
    add_overrides(parser)
    parser.add_argument(
        "--workdir", help="folder of the run (default: under runs/, named after the configuration)"
    )
    parser.add_argument(
        "--compilation_cache", metavar="DIR",
        help="folder that keeps compiled programs between runs, or '' for none (default: "
        "$JAX_COMPILATION_CACHE_DIR, else ~/.cache/convstem_jax)",
    )  # fmt: skip
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    if several_processes:
        group = parser.add_argument_group(
            "several processes",
            "they find each other on Cloud TPU (also in GKE), under SLURM and under Open MPI; "
            "elsewhere give every process all three",
        )
        group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
        group.add_argument(
            "--processes", type=int, metavar="N", help="how many there are; 1 looks for no others"
        )
        group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds --config.FIELD=VALUE to the help; `parse` reads what was given."""
    parser.add_argument(
        "--config.FIELD=VALUE", dest="_", action="store_true",
        help="override a field of the configuration",
    )  # fmt: skip


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --step and --raw, which are `step` and `raw` of `weights.load`."""

    def step(text):
        if text != "best" and not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text} is neither the number of a step nor best")
        return text if text == "best" else int(text)

    parser.add_argument(
        "--step", type=step, metavar="N",
        help='checkpoint of a run, or "best" (default: the latest)',
    )  # fmt: skip
    parser.add_argument(
        "--raw", action="store_true",
        help="the weights of the last update, not their moving average (EMA)",
    )  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The arguments that the parser knows, and the overridden fields with their values as text."""
    argv = sys.argv[1:] if argv is None else argv
    # argparse would mistake a field whose value has a space for a positional argument.
    fields = [arg for arg in argv if arg.startswith("--config.")]
    args, rest = parser.parse_known_args([arg for arg in argv if arg not in fields])
    overrides = {}
    for arg in rest + fields:
        match = _OVERRIDE.fullmatch(arg)
        if not match:
            parser.error(f"unexpected argument '{arg}': fields are set by --config.FIELD=VALUE")
        field, equals, text = match.groups()
        if not equals:
            parser.error(f"{arg} has no value: write {arg}=VALUE")
        overrides[field] = text
    return args, overrides


def default_workdir(config: str, overrides: dict[str, str]) -> str:
    """The default folder: runs/ and the configuration's name, argument and overridden fields.

    Fields that change no result are left out: with other values of them it is the same run.
    """
    path, _, arg = config.partition(":")
    words, fields = split_argument(arg)
    fields = sorted((fields | overrides).items())
    named = [f"{key}={value}" for key, value in fields if key not in FREE_FIELDS]
    name = os.path.splitext(os.path.basename(path))[0]
    text = "_".join(filter(None, [name, *sorted(words), *named]))
    return os.path.join("runs", re.sub(r"[^\w.=-]+", "_", text))


def silence_libraries() -> None:
    """Silences libraries, so that an error is only its one line on the terminal.

    Orbax, asyncio and TensorStore's callbacks write pages about a failed save.
    """
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    # For Python's own process that frees shared memory, which Grain leaves behind of its last
    # batches: it is started with these options.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
