"""Flops, parameters and activations of any model, counted from its traced program.

    python -m convstem_jax.complexity                        the paper's Tables 1 and 2
    python -m convstem_jax.complexity --format markdown      text, markdown or json
    python -m convstem_jax.complexity --model vitc_tiny --num_classes 10

The paper's rules: flops are the multiply-adds of convolutions and matrix products and the additions
of their biases; activations are the outputs of convolutions and matrix products, the attention maps
included. Norms, softmax and activation functions cost nothing.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import json
import math
import sys

from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
from tabulate import tabulate

from convstem_jax.jaxprs import inner_programs, multiply_adds
from convstem_jax.models import MODELS, create_model
from convstem_jax.models.vit import ViTSpec
from convstem_jax.step import split_model
from convstem_jax.terminal import new_parser, tell


@dataclasses.dataclass(frozen=True)
class Complexity:
    """The cost of one image through a model."""

    flops: int
    params: int
    acts: int


# Tables 1 and 2 as printed: flops (G), parameters (M), activations (M).
PAPER = {
    "vitp_1gf": (1.1, 4.8, 5.5),
    "vitp_4gf": (3.9, 18.5, 11.1),
    "vitp_18gf": (17.5, 86.7, 24.0),
    "vitp_36gf": (35.9, 178.4, 37.3),
    "vitc_1gf": (1.1, 4.6, 5.7),
    "vitc_4gf": (4.0, 17.8, 11.3),
    "vitc_18gf": (17.7, 81.6, 24.1),
    "vitc_36gf": (35.0, 167.8, 36.7),
    "regnety_1gf": (1.0, 9.6, 6.2),
    "regnety_4gf": (4.1, 22.4, 14.5),
    "regnety_16gf": (15.5, 72.3, 30.7),
    "regnety_32gf": (31.1, 128.6, 46.2),
}
MISPRINTS = {
    ("vitp_18gf", "params"): "86.7 in Table 1 and 86.6 in Table 2; its definition gives 86.6",
    ("vitc_36gf", "flops"): "35.0; its definition gives 34.9",
}
COLUMNS = ("flops", "params", "acts")
_UNITS = (1e9, 1e6, 1e6)
# Operations whose results still count as the parameter or the product that they are applied to.
_SAME_VALUES = (
    "reshape",
    "broadcast_in_dim",
    "convert_element_type",
    "slice",
    "squeeze",
    "unstack",  # in newer JAX, where 0.10 has slices
)


def complexity(model: nnx.Module) -> Complexity:
    """Counts one image of `model.spec.image_size` through `model`, which may hold only shapes.

    The paper counts all tokens of a ViT's last block, its MLPs without the class token, and the
    addition of the position embedding like the output of a product; so does this function.
    """
    size = model.spec.image_size
    graphdef, params, batch_stats = split_model(model)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    options = {"all_tokens": True} if isinstance(model.spec, ViTSpec) else {}

    def forward(params, batch_stats, images):
        return nnx.merge(graphdef, params, batch_stats)(images, **options)

    jaxpr = jax.make_jaxpr(forward)(params, batch_stats, images).jaxpr
    paths = [
        tuple(getattr(key, "key", None) for key in path)
        for path, _ in jax.tree.leaves_with_path((params, batch_stats, images))
    ]
    flops = acts = 0.0
    for path, new_flops, new_acts in _count(jaxpr, dict(zip(jaxpr.invars, paths, strict=True))):
        share = 1.0
        if "mlp" in path:
            num_tokens = params["position_embedding"].shape[1]
            share = (num_tokens - 1) / num_tokens
        flops += share * new_flops
        acts += share * new_acts
    return Complexity(
        round(flops), sum(math.prod(x.shape) for x in jax.tree.leaves(params)), round(acts)
    )


def _count(jaxpr, params: dict) -> Iterator[tuple[tuple, int, int]]:
    """Yields (path of the parameter, flops, activations) of each product and of each bias.

    Args:
        jaxpr: a traced program.
        params: its variables that hold a parameter or a part of one -> the parameter's path.
    """
    products = set()  # variables that a product has just made
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, core.Literal)]
        path = next((params[v] for v in inputs if v in params), ())
        name, size = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape)
        if flops := multiply_adds(eqn):
            yield path, flops, size
            products.add(eqn.outvars[0])
        elif name == "add" and path and products.intersection(inputs):
            yield path, size, 0
        elif name == "add" and path[-1:] == ("position_embedding",):
            yield path, size, size
        elif name in _SAME_VALUES:
            if path:
                params |= dict.fromkeys(eqn.outvars, path)
            if products.intersection(inputs):
                products.update(eqn.outvars)
        if name in ("scan", "while", "cond"):
            raise ValueError(f"this model's program has a {name}, which is not counted")
        for inner in inner_programs(eqn):
            outer = zip(inner.invars, eqn.invars, strict=True)
            known = ((v, o) for v, o in outer if not isinstance(o, core.Literal))
            yield from _count(inner, {v: params[o] for v, o in known if o in params})


def rows(names: Iterable[str], num_classes: int = 1000, **changes) -> list[dict]:
    """Counts models.

    Args:
        names: keys of `MODELS`.
        num_classes: of the heads.
        **changes: fields of the models' specs to replace.

    Returns:
        For each model: `model`, `flops`, `params`, `acts`, and what the paper prints for it as
        `paper_flops`, `paper_params`, `paper_acts`, None where it prints nothing.
    """
    table = []
    for name in names:

        def new_model(name=name):
            return create_model(name, num_classes=num_classes, rngs=nnx.Rngs(0), **changes)

        counts = dataclasses.asdict(complexity(nnx.eval_shape(new_model)))
        as_printed = num_classes == 1000 and not changes
        printed = (as_printed and PAPER.get(name)) or (None,) * 3
        paper = {
            f"paper_{column}": value and round(value * unit)
            for column, value, unit in zip(COLUMNS, printed, _UNITS, strict=True)
        }
        table.append({"model": name} | counts | paper)
    return table


def _print_table(table: list[dict], tablefmt: str) -> None:
    lines, notes = [], []
    for row in table:
        line = [row["model"]]
        for column, unit in zip(COLUMNS, _UNITS, strict=True):
            value, paper = row[column] / unit, row[f"paper_{column}"]
            line.append(f"{value:.3f}" if value >= 0.1 else f"{value:#.3g}")
            if paper is None:
                line += ["–", "–"]
                continue
            misprint = MISPRINTS.get((row["model"], column))
            line += [f"{paper / unit:.1f}{'*' if misprint else ''}", f"{value - paper / unit:+.3f}"]
            if misprint:
                notes.append(f"* {row['model']}, {column}: the paper prints {misprint}.")
        lines.append(line)
    headers = ["model"]
    for column in ("flops (G)", "params (M)", "acts (M)"):
        headers += [column, "paper", "difference"]
    align = ["left"] + ["right"] * 9
    print(tabulate(lines, headers, tablefmt, disable_numparse=True, colalign=align))
    for note in notes:
        print(note)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = new_parser(
        "convstem_jax.complexity",
        "Counts flops, parameters and activations, and shows the paper's beside them.",
    )
    parser.add_argument(
        "--model", action="append", choices=MODELS, metavar="NAME",
        help=f"may be repeated; by default the paper's. One of {', '.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument("--image_size", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--num_classes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument(
        "--format", choices=("text", "markdown", "json"), default="text",
        help="json: a list of objects with model, flops, params, acts and paper_…, all as plain "
        "numbers (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    changes = {} if args.image_size is None else {"image_size": args.image_size}
    try:
        table = rows(args.model or PAPER, num_classes=args.num_classes, **changes)
    except ValueError as error:
        return tell(error)
    if args.format == "json":
        print(json.dumps(table, indent=2))
    else:
        _print_table(table, {"text": "simple", "markdown": "github"}[args.format])
    return 0


if __name__ == "__main__":
    sys.exit(main())
