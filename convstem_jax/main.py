"""Trains a model, or goes on with an interrupted run."""

import argparse
import logging as python_logging
import os
import re
import signal
import sys

if __name__ == "__main__":  # while the imports below take their seconds, Ctrl-C needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# TensorFlow only writes our TensorBoard files; it need not greet.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import logging
import jax

from convstem_jax import train
from convstem_jax.config import load_config, set_fields
from convstem_jax.errors import Preempted, UserError
from convstem_jax.run_folder import FREE_FIELDS

_EPILOG = """\
examples:
  python -m convstem_jax.main --config configs/quickstart.py
  python -m convstem_jax.main --config configs/vitc.py:18gf,sgd --workdir runs/first
  python -m convstem_jax.main --config configs/vitc.py --config.lr=5e-4 --config.epochs=50

configs/common.py lists the fields. The same command run again resumes an interrupted run.

exit status:
  0 done · 2 configuration, or no such data · 3 damaged data · 4 checkpoint · 5 not finite
  75 asked to stop, and saved · 130 interrupted
"""
_OVERRIDE = re.compile(r"--config\.([^=]+)(=?)(.*)", re.DOTALL)


def main(argv: list[str]) -> int:
    """Reads the command line and trains; returns the exit status."""
    args, overrides = _parse_command_line(argv)
    try:
        config = load_config(args.config)
        set_fields(config, overrides)
        if args.compilation_cache:
            cache = os.path.expanduser(args.compilation_cache)
            jax.config.update("jax_compilation_cache_dir", cache)
        train.train(config, args.workdir or _default_workdir(args.config, overrides))
    except UserError as error:
        if args.traceback:
            raise
        prefix = "" if isinstance(error, Preempted) else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: what was saved before is kept", file=sys.stderr)
        return 130
    return 0


def _parse_command_line(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = argparse.ArgumentParser(
        prog="python -m convstem_jax.main",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]",
        help="configuration file, with its argument after a colon: configs/vitc.py:18gf,sgd",
    )  # fmt: skip
    parser.add_argument(
        "--config.FIELD=VALUE", dest="_", action="store_true",
        help="override a field of the configuration",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", help="folder of the run (default: under runs/, named after the configuration)"
    )
    parser.add_argument(
        "--compilation_cache", default="~/.cache/convstem_jax", metavar="DIR",
        help="folder that keeps compiled programs between runs, or '' (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    args, rest = parser.parse_known_args(argv)
    overrides = {}
    for arg in rest:
        match = _OVERRIDE.fullmatch(arg)
        if not match:
            parser.error(f"unexpected argument '{arg}'")
        name, equals, text = match.groups()
        if not equals:
            parser.error(f"{arg} has no value: write {arg}=VALUE")
        overrides[name] = text
    return args, overrides


def _default_workdir(config: str, overrides: dict[str, str]) -> str:
    """runs/ and the configuration's name, argument and overridden fields.

    Fields that change no result are left out: with other values the run is still the same.
    """
    path, _, arg = config.partition(":")
    parts = [part.strip() for part in arg.split(",")]
    words = sorted(part for part in parts if "=" not in part)
    fields = dict(part.split("=", 1) for part in parts if "=" in part) | overrides
    named = [f"{key}={value}" for key, value in sorted(fields.items()) if key not in FREE_FIELDS]
    name = os.path.splitext(os.path.basename(path))[0]
    text = "_".join(filter(None, [name, *words, *named]))
    return os.path.join("runs", re.sub(r"[^\w.=-]+", "_", text))


def _silence_libraries() -> None:
    """Leaves the one line of an error alone on the terminal.

    Orbax, asyncio and TensorStore's callbacks write pages about a save that failed.
    """
    logging.set_verbosity(logging.FATAL)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "--traceback" not in sys.argv:
        _silence_libraries()
    sys.exit(main(sys.argv[1:]))
