"""Reads a configuration file, and sets its fields from text.

A configuration is a Python file with `get_config(arg)` that returns a flat ConfigDict.
"""

import ast
import importlib.util
import json
import os
import sys

import ml_collections

from convstem_jax import files
from convstem_jax.errors import ConfigError, first_line
from convstem_jax.models import MODELS
from convstem_jax.optim import OPTIMIZERS
from convstem_jax.rules import RULES, unknown_field, validate


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Loads `FILE.py` or `FILE.py:ARGUMENT`.

    Raises:
        ConfigError: the file is not there, or does not accept the argument.
    """
    path, _, arg = spec.partition(":")
    if not (os.path.isfile(path) and path.endswith(".py")):
        wrong = "a Python file" if os.path.exists(path) else f"there, seen from {os.getcwd()}"
        hint = "configs/ holds those of this project"
        for name in (f"{path}.py", f"configs/{path}.py", f"configs/{path}"):
            hint = f"did you mean {name}?" if os.path.isfile(name) else hint
        raise ConfigError(f"--config {path} is not {wrong}: {hint}")
    name = f"config_{os.path.splitext(os.path.basename(path))[0]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(module_spec)
    # `import configs`: of the file's own project, else of this one.
    own, ours = (os.path.dirname(os.path.dirname(os.path.abspath(x))) for x in (path, __file__))
    before, sys.path = sys.path, [own, *sys.path]
    if importlib.util.find_spec("configs") is None:
        sys.path.append(ours)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config {path} has no function get_config(arg)")
        return module.get_config(arg).lock()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"--config {spec} fails with {first_line(error)}") from error
    finally:
        sys.path = before


def load_run_config(workdir: str) -> ml_collections.ConfigDict:
    """The configuration that a run was trained with, from its folder.

    Raises:
        ConfigError: the folder has none that can be read.
    """
    workdir = os.path.expanduser(workdir)
    if not os.path.exists(workdir):
        raise ConfigError(files.not_there(workdir))
    if not os.path.isdir(workdir):
        raise ConfigError(
            f"{workdir} is not a run's folder: give --config to say what the images are"
        )
    try:
        with open(os.path.join(workdir, "config.json")) as file:
            fields = json.load(file)
        fields = {name: fields[name] for name in RULES}
    except FileNotFoundError as error:
        raise ConfigError(f"{workdir} is not a run's folder: it has no config.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{workdir} has no config.json of this version ({first_line(error)}): give --config"
        ) from error
    # JSON has lists, but no tuples.
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    config = ml_collections.ConfigDict(fields).lock()
    validate(config)
    return config


def split_argument(arg: str) -> tuple[list[str], dict[str, str]]:
    """Words and fields of an argument such as `18gf,sgd,mean=(0.5, 0.5, 0.5)`.

    Raises:
        ConfigError: a bracket has no partner, or a field is there twice.
    """
    parts, depth = [""], 0
    for char in arg:
        depth += (char in "([") - (char in ")]")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    if depth:
        raise ConfigError(f"a bracket of {arg} has no partner")
    parts = [part.strip() for part in parts]
    words = [part for part in parts if part and "=" not in part]
    fields = [part.split("=", 1) for part in parts if "=" in part]
    names = [name for name, _ in fields]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{arg} sets {twice[0]} twice")
    return words, dict(fields)


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Sets a field from text, converted to the type that the field has.

    Raises:
        ConfigError: there is no such field, or the text is not of its type.
    """
    if name not in config:
        raise unknown_field(name, config)
    kind = type(config[name])
    try:
        if kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif kind is tuple:
            value = tuple(ast.literal_eval(text))
        else:
            value = kind(text)
    except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ConfigError(
            f"config.{name}={text}: it must be {words.get(kind, 'such as')}"
            + ("" if kind in words else f" {config[name]}")
        ) from error
    config[name] = value


def set_fields(config: ml_collections.ConfigDict, fields: dict[str, str]) -> None:
    """Sets fields from text, as `set_field` does.

    Raises:
        ConfigError: as from `set_field`; or the model or the optimiser changes without the fields
            that belong to it: learning rate and weight decay to both, image size to the model.
    """
    for name in fields:
        if name not in config:
            raise unknown_field(name, config)
    for name, known in (("model", MODELS), ("optimizer", OPTIMIZERS)):
        # An unknown one is for `validate` to refuse.
        is_other = fields.get(name) in known and fields[name] != config[name]
        kept = [x for x in ("lr", "wd") if x not in fields]
        if is_other and kept:
            kept = " and ".join(f"{x}={config[x]:g}" for x in kept)
            raise ConfigError(
                f"config.{name}={fields[name]} would keep {kept} of {config[name]}: "
                "give lr and wd too, or choose by a word after the configuration file, as in "
                "configs/vitc.py:18gf,sgd"
            )
    size = MODELS[fields["model"]].image_size if fields.get("model") in MODELS else None
    if size not in (None, config.image_size) and not {"image_size", "eval_resize"} <= fields.keys():
        raise ConfigError(
            f"config.model={fields['model']} is made for {size} pixels and this configuration has "
            f"{config.image_size}: give image_size and eval_resize too, or choose another file"
        )
    for name, text in fields.items():
        set_field(config, name, text)
