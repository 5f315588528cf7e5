"""Loads the weights of a trained model from a run's folder or a file, and saves them to a file."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import re
from typing import Any

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convstem_jax import files, run_folder
from convstem_jax.checkpoint import Checkpoints
from convstem_jax.errors import CheckpointError, ConfigError
from convstem_jax.models import MODELS, create_model
from convstem_jax.sharding import without_mesh
from convstem_jax.step import PyTree, by_name, split_model

Weights = dict[str, PyTree]  # {"params", "batch_stats"}: nested dicts of arrays


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What it takes to build the model that weights belong to."""

    model: str  # a key of `models.MODELS`
    num_classes: int
    image_size: int
    class_names: tuple[str, ...] = ()  # in the order of the logits; none where they are unknown

    def build(self, **kwargs) -> nnx.Module:
        """A new model; `kwargs` as in `create_model`."""
        kwargs = {"rngs": nnx.Rngs(0)} | kwargs
        return create_model(
            self.model, num_classes=self.num_classes, image_size=self.image_size, **kwargs
        )

    def graphdef(self, **kwargs) -> nnx.GraphDef:
        """The model without its weights; `kwargs` as in `create_model`."""
        return split_model(nnx.eval_shape(lambda: self.build(**kwargs)))[0]

    def with_weights(self, weights: Weights, dtype: jnp.dtype) -> nnx.Module:
        """The model with these weights, in evaluation mode; it computes in `dtype`."""
        params, batch_stats = weights["params"], weights["batch_stats"]
        params, batch_stats = jax.tree.map(jnp.asarray, (params, batch_stats))
        return nnx.merge(self.graphdef(dtype=dtype), params, batch_stats)

    def check(self, config: ml_collections.ConfigDict, path: str) -> None:
        """Checks that a configuration is for this model.

        Raises:
            ConfigError: it is for another model or image size than the weights at `path`.
        """
        own = f"a {self.model} for {self.image_size} pixels"
        asked = f"a {config.model} for {config.image_size} pixels"
        if own != asked:
            raise ConfigError(f"{path} is {own}, but the configuration is of {asked}: give its own")

    def has_classes(self, names: Sequence[str]) -> bool:
        """Whether its classes have these names, as far as is known."""
        return not self.class_names or self.class_names == tuple(names)

    def shapes(self) -> Weights:
        """Shapes of the model's weights."""
        _, params, batch_stats = split_model(nnx.eval_shape(self.build))
        return {"params": params, "batch_stats": batch_stats}


def load_model(
    path: str, *, raw: bool = False, step: int | str | None = None, dtype: jnp.dtype = jnp.float32
) -> nnx.Module:
    """Loads a trained model, e.g. `load_model("runs/quickstart")`, in evaluation mode.

    Args:
        path: a run's folder, or a file that `save` wrote.
        raw: the weights of the last update in place of their moving average (EMA).
        step: number of the checkpoint, or "best" for the one whose EMA has the lowest top-1 error;
            the latest one by default.
        dtype: type to compute in.

    Raises:
        ConfigError: there is no model at `path`, or `raw` or `step` is given for a file.
        CheckpointError: it is damaged, or there is no such step.
    """
    weights, architecture = load(path, raw=raw, step=step)
    return architecture.with_weights(weights, dtype)


def load(
    path: str, *, raw: bool = False, step: int | str | None = None
) -> tuple[Weights, Architecture]:
    """Loads weights and the architecture that they belong to; see `load_model`."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _load_run(path, raw, step)
    if raw or step is not None:
        raise ConfigError(f"raw and step are for a run's folder: {path} is one state")
    convert = "convert it first, with python -m convstem_jax.convert --from LAYOUT"
    import safetensors  # here, since a study does not need it

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names, metadata = file.keys(), file.metadata() or {}
            found = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ConfigError(files.not_there(path)) from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path} is neither a run's folder nor a safetensors file ({error}). Another project's "
            f"file? Then {convert}"
        ) from error
    if "convstem_jax" not in metadata:
        raise CheckpointError(f"{path} was not written by this project: {convert}")
    try:
        described = json.loads(metadata["convstem_jax"])
        class_names = tuple(described.pop("class_names", ()))
        architecture = Architecture(**described, class_names=class_names)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no model of this version: {error}") from error
    _check_fit(path, found, architecture)
    tree = nnx.restore_int_paths(traverse_util.unflatten_dict(found, sep="/"))
    return {"batch_stats": {}} | tree, architecture


def save(path: str, weights: Weights, architecture: Architecture) -> None:
    """Writes weights to a safetensors file.

    Raises:
        CheckpointError: it cannot be written.
    """
    import safetensors.numpy

    try:
        # safetensors writes memory as it lies, even that of a transposed view.
        arrays = {name: np.ascontiguousarray(x) for name, x in by_name(weights).items()}
        metadata = {"convstem_jax": json.dumps(dataclasses.asdict(architecture))}
        # Its own `save_file` makes files that other users may not read.
        files.write(path, safetensors.numpy.save(arrays, metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _check_fit(path: str, found: dict[str, np.ndarray], architecture: Architecture) -> None:
    """Checks that arrays can be a model's weights: their names, shapes and numbers."""
    try:
        wanted = by_name(architecture.shapes())
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes no model of this version: {error}") from error
    wrong = misfits(found, wanted)
    if wrong:
        raise CheckpointError(f"{path} does not hold a {architecture.model}; {listed(wrong)}")


def misfits(found: Mapping[str, np.ndarray], wanted: Mapping[str, Any]) -> list[str]:
    """Lists by name the arrays that are missing, unknown, not finite or of a wrong shape."""
    wrong = [f"missing: {name}" for name in wanted.keys() - found.keys()]
    wrong += [f"unknown: {name}" for name in found.keys() - wanted.keys()]
    wrong += [
        f"shape: {name} is {found[name].shape} and should be {wanted[name].shape}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    wrong += [
        f"not finite: {name}"
        for name in wanted.keys() & found.keys()
        if not np.isfinite(found[name]).all()
    ]
    return sorted(wrong)


def listed(wrong: list[str]) -> str:
    """The first of the `misfits`, and how many there are."""
    more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
    return "\n  ".join([f"{len(wrong)} tensors do not fit:", *wrong[:10], *more])


def _load_run(path: str, raw: bool, step: int | str | None) -> tuple[Weights, Architecture]:
    try:
        is_run = run_folder.has_checkpoint(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not is_run:
        inside = re.fullmatch(r"(.+)/checkpoints(/\d+)?", os.path.abspath(path))
        run = inside[1] if inside else "the folder of a run"
        raise ConfigError(f"{path} holds no checkpoint: name {run}")
    if step not in (None, "best") and not isinstance(step, (int, np.integer)):
        raise ConfigError(f"step is {step!r}: give a number of updates, or 'best'")
    try:
        with open(os.path.join(path, "config.json")) as file:
            config = json.load(file)
        model, image_size = config["model"], config["image_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}/config.json cannot be read: {error}") from error
    if model in MODELS:
        now = {"architecture": dataclasses.asdict(MODELS[model])}
        if changes := run_folder.changes_of_network(config, now):
            raise CheckpointError(
                f"{path} was trained with another {model} ({changes}): take the code of then"
            )
    folder = os.path.abspath(os.path.join(path, "checkpoints"))
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        if step == "best":
            step = checkpoints.best_step()
        with without_mesh():
            ema, last = checkpoints.restore_weights(step)
    finally:
        checkpoints.close()
    weights = jax.device_get(last if raw else ema)
    num_classes = len(weights["params"]["head"]["bias"])
    _check_fit(path, by_name(weights), Architecture(model, num_classes, image_size))
    class_names = tuple(run_folder.read_classes(path))
    if class_names and len(class_names) != num_classes:
        raise ConfigError(
            f"{path}/{run_folder.CLASSES} has {len(class_names)} lines for {num_classes} classes: "
            "restore it, or delete it to use numbers"
        )
    return weights, Architecture(model, num_classes, image_size, class_names)
