"""Evaluates trained weights: errors and loss on every image of a split, each counted once.

WEIGHTS is a run's folder, or a file of convstem_jax.convert. A run's own configuration says which
images are read and how they are prepared; for a file, or for other data, give --config.
"""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import ml_collections

from convstem_jax import build, command_line, weights
from convstem_jax.config import load_config, load_run_config, set_fields
from convstem_jax.data import pipeline, sources
from convstem_jax.errors import ConfigError, UserError
from convstem_jax.evaluation import evaluate
from convstem_jax.rules import validate
from convstem_jax.sharding import Sharding
from convstem_jax.step import eval_step
from convstem_jax.terminal import new_parser, progress_bar, tell

_EPILOG = """\
examples:
  python -m convstem_jax.evaluate runs/quickstart
  python -m convstem_jax.evaluate runs/vitc_18gf --step best --config.data_dir=/data
  python -m convstem_jax.evaluate vitp_18gf.safetensors --config configs/vitp.py:18gf

It runs in one process, on all of its devices.

exit status:
  0 done · 2 wrong arguments, or no such file or data · 3 damaged data
  4 weights that cannot be read · 75 storage did not answer: try again
"""


def evaluate_weights(
    config: ml_collections.ConfigDict,
    path: str,
    *,
    raw: bool = False,
    step: int | str | None = None,
) -> dict[str, float]:
    """Evaluates weights on `config.eval_split`.

    Args:
        config: its fields of the data, the preprocessing, `dtype` and `eval_batch_size` are used.
        path: as for `weights.load_model`, as are `raw` and `step`.

    Returns:
        What `evaluation.evaluate` returns for one set of weights.

    Raises:
        UserError: weights, configuration and data do not belong together, or cannot be read.
    """
    validate(config)
    split = sources.open_split(config.data_dir, config.dataset, config.eval_split)
    loaded, architecture = weights.load(path, raw=raw, step=step)
    architecture.check(config, path)
    if architecture.num_classes != split.num_classes:
        raise ConfigError(
            f"{path} has {architecture.num_classes} classes and {config.dataset} has "
            f"{split.num_classes}: set config.dataset to data of the model's classes"
        )
    if not architecture.has_classes(split.class_names):
        pairs = zip(architecture.class_names, split.class_names, strict=True)
        i, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if len(set(pair)) == 2)
        print(
            f"the classes have other names: class {i} is {there} for {path}, and {here} in "
            f"{config.dataset}; the errors mean something only if both are the same",
            file=sys.stderr,
        )
    sharding = Sharding(jax.devices())
    batches = pipeline.EvalBatches(
        build.eval_examples(config, split),
        batch_size=config.eval_batch_size,
        sharding=sharding.batch,
        reading=pipeline.Reading.of(config),
    )
    graphdef = architecture.graphdef(dtype=jnp.dtype(config.dtype))
    recipe = build.recipe(config, split.num_classes)
    jit_eval_step = sharding.jit(eval_step, graphdef, recipe, out_shardings=sharding.replicated)
    loaded = jax.device_put(loaded, sharding.replicated)
    with contextlib.closing(batches):
        progress = progress_bar(batches, f"{config.dataset}/{config.eval_split}", "batch")
        return evaluate(jit_eval_step, {"these": loaded}, progress)["these"]


def main(argv: list[str] | None = None) -> int:
    """Evaluates and prints; returns the exit status."""
    parser = new_parser("convstem_jax.evaluate", __doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="configuration file (default: the run's own)"
    )
    command_line.add_overrides(parser)
    command_line.add_checkpoint(parser)
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="default: %(default)s"
    )
    args, overrides = command_line.parse(parser, argv)
    command_line.keep_programs()
    try:
        config = load_config(args.config) if args.config else load_run_config(args.weights)
        set_fields(config, overrides)
        results = evaluate_weights(config, args.weights, raw=args.raw, step=args.step)
    except UserError as error:
        return tell(error)
    if args.format == "json":
        print(json.dumps(results, indent=2))
    else:
        print(
            f"top-1 error {results['top1_error']:.2f} %, top-5 error {results['top5_error']:.2f} "
            f"%, loss {results['loss']:.4f} on the {results['examples']:,} images of "
            f"{config.dataset}/{config.eval_split}"
        )
    return 0


if __name__ == "__main__":
    command_line.silence_libraries()
    sys.exit(main())
