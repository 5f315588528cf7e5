"""Classifies images with trained weights: prints the most probable classes of each.

WEIGHTS is a run's folder, or a file of convstem_jax.convert. A run's own configuration says how
images are prepared; for a file, give --config.
"""

from collections.abc import Iterable, Sequence
import itertools
import json
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from convstem_jax import command_line, weights
from convstem_jax.config import load_config, load_run_config
from convstem_jax.data.augment import center_crop
from convstem_jax.data.sources import decode
from convstem_jax.errors import ConfigError, DataError, UserError
from convstem_jax.rules import validate
from convstem_jax.sharding import Sharding, without_mesh
from convstem_jax.terminal import new_parser, positive, tell

_EPILOG = """\
examples:
  python -m convstem_jax.predict runs/vitc_18gf photo.jpg --top 3
  python -m convstem_jax.predict vitp_18gf.safetensors *.jpg --config configs/vitp.py:18gf \\
      --names classes.txt --format json

exit status:
  0 done · 2 wrong arguments, or no such file · 3 a file that is no image
  4 weights that cannot be read · 75 storage did not answer: try again
Images that cannot be read are named; the others are classified nevertheless. Of several
statuses the highest is returned.
"""
BATCH_SIZE = 64


def load_image(path: str, config: ml_collections.ConfigDict) -> np.ndarray:
    """Reads an image and prepares it; `config` as in `prepare`.

    Raises:
        ConfigError: the file does not exist, or may not be read.
        DataError: it is not an image.
    """
    try:
        with open(path, "rb") as file:
            image = decode(file.read())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if image is None:
        raise DataError(f"{path} cannot be decoded as an image: mend it, or leave it out")
    return prepare(image, config)


def prepare(image: np.ndarray, config: ml_collections.ConfigDict) -> np.ndarray:
    """Prepares a uint8 image `[h, w, 3]` for the model, as in evaluation: float32 `[H, W, 3]`.

    `config` has `eval_resize`, `image_size`, `mean` and `std`.
    """
    image = center_crop(image, resize=config.eval_resize, size=config.image_size)
    return ((image / 255 - config.mean) / config.std).astype(np.float32)


def predict(model: nnx.Module, images: Iterable[np.ndarray]) -> np.ndarray:
    """Probabilities of the classes, float32 `[N, num_classes]`, on this process's first device.

    Args:
        model: as `weights.load_model` returns it, or in training mode; it is not changed.
        images: N images, all `[H, W, 3]`, as `prepare` returns them.
    """
    graphdef, state = nnx.split(model)

    def probabilities(state, images):
        model = nnx.merge(graphdef, state)
        model.eval()  # whatever the caller's mode: in training, images depend on each other
        return jax.nn.softmax(model(images).astype(jnp.float32))

    probabilities = Sharding(jax.local_devices()[:1]).jit(probabilities)
    found, images = [], iter(images)
    with without_mesh():
        while batch := list(itertools.islice(images, BATCH_SIZE)):
            # The last of several batches is filled up, so that the same program takes it.
            filled = batch + batch[-1:] * (BATCH_SIZE - len(batch) if found else 0)
            found.append(np.asarray(probabilities(state, np.stack(filled)))[: len(batch)])
    return np.concatenate(found) if found else np.empty((0, 0), np.float32)


def main(argv: list[str] | None = None) -> int:
    """Classifies and prints; returns the exit status."""
    parser = new_parser("convstem_jax.predict", __doc__, epilog=_EPILOG)
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="configuration file (default: the run's own)"
    )
    command_line.add_checkpoint(parser)
    parser.add_argument(
        "--names", metavar="FILE",
        help="names of the classes, one per line (default: those of the run, else numbers)",
    )  # fmt: skip
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="default: %(default)s")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text",
        help="json: a list of objects with image and classes, each a name and a probability "
        "(default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    command_line.keep_programs()
    try:
        config = load_config(args.config) if args.config else load_run_config(args.weights)
        validate(config)
        loaded, architecture = weights.load(args.weights, raw=args.raw, step=args.step)
        architecture.check(config, args.weights)
        names = _names(args.names, architecture)
        model = architecture.with_weights(loaded, jnp.dtype(config.dtype))
    except UserError as error:
        return tell(error)
    paths, status = [], 0

    def images():
        nonlocal status
        for path in args.images:
            try:
                image = load_image(path, config)
            except UserError as error:
                status = max(status, tell(error))
            else:
                paths.append(path)
                yield image

    found = predict(model, images())
    rows = [
        {
            "image": path,
            "classes": [[names[i], float(row[i])] for i in np.argsort(-row)[: args.top]],
        }
        for path, row in zip(paths, found, strict=True)
    ]
    if args.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(row["image"])
            for name, probability in row["classes"]:
                print(f"  {probability:6.1%}  {name}")
    return status


def _names(path: str | None, architecture: weights.Architecture) -> Sequence[str]:
    num_classes = architecture.num_classes
    if path is None:
        return architecture.class_names or [str(i) for i in range(num_classes)]
    try:
        with open(path) as file:
            names = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"names of classes, {path}, cannot be read: {error}") from error
    if len(names) != num_classes:
        raise ConfigError(f"{path} has {len(names)} lines for {num_classes} classes: see --names")
    return names


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout has none
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    command_line.silence_libraries()
    sys.exit(main())
