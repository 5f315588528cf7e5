"""Trains a model: python -m convstem_jax.main --config configs/quickstart.py

Exit status: 0 done · 2 configuration · 3 data · 4 checkpoint · 5 loss not finite · 75 asked to stop,
and saved.
"""

import os
import re
import sys

from absl import flags, logging
import jax
from ml_collections import config_flags

from convstem_jax.errors import ConfigError, UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with its argument after a colon: configs/vitc.py:1gf,sgd. "
    "Any field is overridden by --config.FIELD=VALUE; configs/common.py lists them.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; an interrupted run there is resumed. By default a folder "
    "under runs/ named after the configuration.",
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    "~/.cache/convstem_jax",
    "Folder that keeps compiled programs from run to run; empty for none.",
)
_TRACEBACK = flags.DEFINE_boolean("traceback", False, "Show the traceback of an error.")

_OVERRIDE = re.compile(r"--?config\.([^=]+)")


def main(argv: list[str]) -> int:
    """Reads the flags, starts JAX and trains; returns the exit status."""
    try:
        _read_flags(argv)
        if _COMPILATION_CACHE.value:
            cache = os.path.expanduser(_COMPILATION_CACHE.value)
            jax.config.update("jax_compilation_cache_dir", cache)
        from convstem_jax import train  # loads TensorFlow, seconds that a wrong flag need not wait

        train.train(_CONFIG.value, _WORKDIR.value or _default_workdir(argv))
    except UserError as error:
        if _TRACEBACK.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _read_flags(argv: list[str]) -> None:
    """Parses the flags, and turns every way to get them wrong into a `ConfigError`."""
    if any(arg in ("-h", "-help", "--help", "--helpfull", "--helpshort") for arg in argv[1:]):
        print(__doc__ + "\n" + flags.FLAGS.module_help(sys.modules[__name__]))
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(argv)[1:]
    except (AttributeError, KeyError) as error:  # ml_collections, for a field that is not there
        raise _unknown_field(argv) from error
    except flags.Error as error:
        # A configuration's own error arrives as the last line of a printed traceback.
        raised = re.findall(r"^\s*(?:\w+\.)*\w+(?:Error|Exception): (.+)$", str(error), re.M)
        raise ConfigError(raised[-1] if raised else str(error).splitlines()[0]) from error
    if rest:
        raise ConfigError(f"unexpected argument '{rest[0]}': flags begin with -- (see --help)")
    path = _config_path()
    if not path:
        raise ConfigError("no --config: try --config configs/quickstart.py (see --help)")
    if not os.path.isfile(path):
        raise ConfigError(f"--config {path} is not a file: configs/ holds those of this project")


def _config_path() -> str:
    return (flags.FLAGS["config"].config_filename or "").split(":", 1)[0]


def _unknown_field(argv: list[str]) -> ConfigError:
    from convstem_jax.validate import unknown_field

    # Once more without the overrides, to know the fields.
    flags.FLAGS.unparse_flags()
    flags.FLAGS([arg for arg in argv if not _OVERRIDE.match(arg)])
    known = list(_CONFIG.value)
    wrong = [m[1] for m in map(_OVERRIDE.match, argv) if m and m[1] not in known]
    return unknown_field(wrong[0] if wrong else "", known)


def _default_workdir(argv: list[str]) -> str:
    """runs/ and the configuration's name, its argument and the overridden fields."""
    name, _, arg = flags.FLAGS["config"].config_filename.partition(":")
    parts = [os.path.splitext(os.path.basename(name))[0], arg]
    parts += [re.sub(r"--?config\.", "", a) for a in sorted(argv) if _OVERRIDE.match(a)]
    return os.path.join("runs", re.sub(r"[^\w.=-]+", "_", "_".join(filter(None, parts))))


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    sys.exit(main(sys.argv))
