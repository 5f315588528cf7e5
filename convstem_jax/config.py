"""Reads a configuration file, sets its fields from text, and checks it.

A configuration is a Python file with `get_config(arg)` that returns a flat ConfigDict.
"""

import ast
import difflib
import importlib.util
import json
import math
import numbers
import os
import re
import sys

import ml_collections

from convstem_jax.errors import ConfigError, first_line
from convstem_jax.models import MODELS
from convstem_jax.models.stems import INITS
from convstem_jax.optim import OPTIMIZERS
from convstem_jax.sharding import STATES


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Loads `FILE.py` or `FILE.py:ARGUMENT`.

    Raises:
        ConfigError: the file is not there, or does not accept the argument.
    """
    path, _, arg = spec.partition(":")
    if not (os.path.isfile(path) and path.endswith(".py")):
        wrong = "a Python file" if os.path.exists(path) else f"there, seen from {os.getcwd()}"
        raise ConfigError(f"--config {path} is not {wrong}: configs/ holds those of this project")
    name = f"config_{os.path.splitext(os.path.basename(path))[0]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(path))))  # `import configs`
    try:
        module_spec.loader.exec_module(module)
        return module.get_config(arg).lock()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config {spec} fails with {first_line(error)}") from error
    finally:
        sys.path.pop(0)


def load_run_config(workdir: str) -> ml_collections.ConfigDict:
    """The configuration that a run was trained with, from its folder.

    Raises:
        ConfigError: it has none that can be read.
    """
    workdir = os.path.expanduser(workdir)
    if not os.path.exists(workdir):
        raise ConfigError(f"{workdir} is not there")
    if not os.path.isdir(workdir):
        raise ConfigError(f"{workdir} is no run's folder: give --config, for what the images are")
    try:
        with open(os.path.join(workdir, "config.json")) as file:
            fields = json.load(file)
        fields = {name: fields[name] for name in RULES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{workdir} has no config.json of this version ({first_line(error)}): give --config"
        ) from error
    # JSON has lists alone.
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    config = ml_collections.ConfigDict(fields).lock()
    validate(config)
    return config


def split_argument(arg: str) -> tuple[list[str], dict[str, str]]:
    """Words and fields of an argument such as `18gf,sgd,mean=(0.5, 0.5, 0.5)`."""
    parts = [part.strip() for part in re.split(r",(?![^(]*\))", arg)]  # not in parentheses
    words = [part for part in parts if part and "=" not in part]
    return words, dict(part.split("=", 1) for part in parts if "=" in part)


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets a field from text, as the type that it has.

    Raises:
        ConfigError: there is no such field, or the text is not of its type.
    """
    if name not in config:
        raise _unknown_field(name, config)
    kind = type(config[name])
    try:
        if kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif kind is tuple:
            value = tuple(ast.literal_eval(text))
        else:
            value = kind(text)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ConfigError(
            f"config.{name}={text}: it must be {words.get(kind, 'such as')}"
            + ("" if kind in words else f" {config[name]}")
        ) from error
    config[name] = value


def set_fields(config: ml_collections.ConfigDict, fields: dict[str, str]) -> None:
    """Sets fields from text, as `set_field` does.

    Raises:
        ConfigError: likewise, and where the model or the optimiser changes alone: the learning rate
            and the weight decay belong to both, the image size to the model.
    """
    for name in fields:
        if name not in config:
            raise _unknown_field(name, config)
    for name, known in (("model", MODELS), ("optimizer", OPTIMIZERS)):
        # An unknown one is for `validate` to refuse.
        is_other = fields.get(name) in known and fields[name] != config[name]
        if is_other and not {"lr", "wd"} <= fields.keys():
            raise ConfigError(
                f"config.{name}={fields[name]} alone would keep the lr and wd of another: give "
                "both too, or choose by a word after the configuration file, as in FILE.py:sgd"
            )
    size = MODELS[fields["model"]].image_size if fields.get("model") in MODELS else None
    if size not in (None, config.image_size) and not {"image_size", "eval_resize"} <= fields.keys():
        raise ConfigError(
            f"config.model={fields['model']} is made for {size} pixels and this configuration has "
            f"{config.image_size}: give image_size and eval_resize too, or choose another file"
        )
    for name, text in fields.items():
        set_field(config, name, text)


def _unknown_field(name: str, known) -> ConfigError:
    short = {"learning_rate": "lr", "weight_decay": "wd"}
    nearest = difflib.get_close_matches(name, [*known, *short], n=1, cutoff=0.5)
    nearest = [short.get(x, x) for x in nearest]
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"fields are {', '.join(known)}"
    return ConfigError(f"unknown config field '{name}': {hint}")


# A rule is the types that a field may have, what its value must satisfy, and the words for it.


def one_of(choices):
    """A rule: one of some texts."""
    choices = tuple(choices)
    return str, lambda v: v in choices, f"one of {', '.join(choices)}"


def integer(low, high=math.inf):
    """A rule: a whole number."""
    words = f"a whole number of {low} or more" if high == math.inf else f"from {low} to {high}"
    return int, lambda v: low <= v <= high, words


def number(holds, words):
    """A rule: a finite number that `holds`, which `words` describe."""
    return (int, float), lambda v: math.isfinite(v) and holds(v), f"a number {words}"


_POSITIVE = number(lambda v: v > 0, "above 0")
_NOT_NEGATIVE = number(lambda v: v >= 0, "of 0 or more")
_CHANNELS = (
    tuple,
    lambda v: len(v) == 3 and all(isinstance(x, numbers.Real) and 0 < x < 1 for x in v),
    "three numbers between 0 and 1",
)
_TEXT = str, bool, "a text that is not empty"
_FLAG = bool, lambda v: True, "True or False"

RULES = {
    "model": one_of(MODELS),
    "dtype": one_of(["bfloat16", "float32"]),
    "stem_init": one_of(INITS),
    "init_from": (str, lambda v: True, "a path, or empty"),
    "optimizer": one_of(OPTIMIZERS),
    "lr": _POSITIVE,
    "wd": _NOT_NEGATIVE,
    "batch_size": integer(1),
    "accumulate": integer(1),
    "state_sharding": one_of(STATES),
    "epochs": _POSITIVE,
    "warmup_epochs": _NOT_NEGATIVE,
    "label_smoothing": number(lambda v: 0 <= v < 1, "from 0 to below 1"),
    "mixup_alpha": _NOT_NEGATIVE,
    "cutmix_alpha": _NOT_NEGATIVE,
    "lighting_std": _NOT_NEGATIVE,
    "ema_alpha": _POSITIVE,
    "ema_every": integer(1),
    "seed": integer(0, 2**32 - 1),
    "data_seed": integer(-1, 2**32 - 1),
    "dataset": _TEXT,
    "data_dir": _TEXT,
    "train_split": _TEXT,
    "eval_split": _TEXT,
    "image_size": integer(1),
    "eval_resize": integer(1),
    "min_crop_area": number(lambda v: 0 < v <= 1, "above 0, to 1"),
    "flip": _FLAG,
    "auto_augment": _FLAG,
    "mean": _CHANNELS,
    "std": _CHANNELS,
    "num_workers": integer(0),
    "num_threads": integer(0),
    "read_ahead": integer(1),
    "prefetch": integer(1),
    "eval_batch_size": integer(1),
    "precise_bn_examples": integer(0),
    "eval_every_epochs": _POSITIVE,
    "log_every_steps": integer(1),
    "checkpoint_every_steps": integer(1),
    "keep_checkpoints": integer(1),
    "profile_step": integer(0),
}


def validate(config) -> None:
    """Checks each field's value, and the fields against each other.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    if "experiments" in config:
        raise ConfigError("--config is a study's: give it to python -m convstem_jax.study")
    check_fields(config, RULES)
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(
            f"config.warmup_epochs={config.warmup_epochs} is not below config.epochs="
            f"{config.epochs}: lower the one or raise the other"
        )
    if config.eval_resize < config.image_size:
        raise ConfigError(
            f"config.eval_resize={config.eval_resize} is below config.image_size="
            f"{config.image_size}: the centre crop would not fit"
        )


def check_fields(config, rules) -> None:
    """Checks that a configuration has exactly the fields of `rules`, each as its rule says.

    Raises:
        ConfigError: likewise.
    """
    for name in config:
        if name not in rules:
            raise _unknown_field(name, rules)
    for name, (types, holds, words) in rules.items():
        if name not in config:
            raise ConfigError(f"the configuration has no field '{name}': it must be {words}")
        value = config[name]
        # True is an integer to Python, and to nobody else.
        is_type = isinstance(value, types) and (types is bool or not isinstance(value, bool))
        if not is_type or not holds(value):
            raise ConfigError(f"config.{name}={value!r}: it must be {words}")


def check_divides(batch_size: int, divisor: int, what: str) -> None:
    """Checks that the batch divides evenly.

    Raises:
        ConfigError: it does not; the message names the nearest batch size that does.
    """
    if batch_size % divisor:
        nearest = max(1, round(batch_size / divisor)) * divisor
        raise ConfigError(
            f"config.batch_size={batch_size} does not divide by {what}: "
            f"use {nearest}, or another multiple of {divisor}"
        )
