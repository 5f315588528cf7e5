"""The values that each field of a configuration may have, and conditions between fields."""

import difflib
import math
import numbers

from convstem_jax.errors import ConfigError
from convstem_jax.models import MODELS
from convstem_jax.models.stems import INITS
from convstem_jax.optim import OPTIMIZERS
from convstem_jax.sharding import STATES

# A rule: the types that a field may have, a test of its value, and words that describe the test.


def one_of(choices):
    """A rule: one of some texts."""
    choices = tuple(choices)
    return str, lambda v: v in choices, f"one of {', '.join(choices)}"


def integer(low, high=math.inf):
    """A rule: a whole number."""
    words = f"a whole number of {low} or more" if high == math.inf else f"from {low} to {high}"
    return int, lambda v: low <= v <= high, words


def number(holds, words):
    """A rule: a finite number for which `holds` is true; `words` describe it."""
    return (int, float), lambda v: math.isfinite(v) and holds(v), f"a number {words}"


_POSITIVE = number(lambda v: v > 0, "above 0")
_NOT_NEGATIVE = number(lambda v: v >= 0, "of 0 or more")
_CHANNELS = (
    tuple,
    lambda v: len(v) == 3 and all(isinstance(x, numbers.Real) and 0 < x < 1 for x in v),
    "three numbers between 0 and 1",
)
_TEXT = str, lambda v: v and "\0" not in v, "a text that is not empty"
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
    "epochs": number(lambda v: 0 < v <= 1e6, "above 0, to a million"),
    "warmup_epochs": _NOT_NEGATIVE,
    "label_smoothing": number(lambda v: 0 <= v < 1, "from 0 to below 1"),
    "mixup_alpha": _NOT_NEGATIVE,
    "cutmix_alpha": _NOT_NEGATIVE,
    "lighting_std": _NOT_NEGATIVE,
    "ema_alpha": _POSITIVE,
    "ema_every": integer(1, 2**31 - 1),
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
            f"{config.image_size}, and the centre crop would not fit: change both"
        )


def check_fields(config, rules) -> None:
    """Checks that a configuration has exactly the fields of `rules`, each as its rule says.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    for name in config:
        if name not in rules:
            raise unknown_field(name, rules)
    for name, (types, holds, words) in rules.items():
        if name not in config:
            raise ConfigError(f"the configuration has no field '{name}': it must be {words}")
        value = config[name]
        # True is an integer to Python, and to nobody else.
        is_type = isinstance(value, types) and (types is bool or not isinstance(value, bool))
        if not is_type or not holds(value):
            choices = words.removeprefix("one of ").split(", ")
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.8)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"config.{name}={value!r}: it must be {words}{meant}")


def unknown_field(name: str, known) -> ConfigError:
    """The error for a field that is not among the `known`; it suggests the nearest of them."""
    if name == "workdir":
        return ConfigError("the folder of a run is no field: give --workdir FOLDER")
    short = {"learning_rate": "lr", "weight_decay": "wd"}
    nearest = difflib.get_close_matches(name, [*known, *short], n=1, cutoff=0.5)
    nearest = [short.get(x, x) for x in nearest]
    hint = f"did you mean '{nearest[0]}'?" if nearest else f"fields are {', '.join(known)}"
    return ConfigError(f"unknown config field '{name}': {hint}")
