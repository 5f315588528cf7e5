"""The TPU compiler's estimate of a training step: this project's against plain Flax's.

    python -m benchmarks.tpu_cycles --models vitc_4gf vitc_18gf --topology v4:2x2x1 v5e:2x2 v6e:2x2

It needs libtpu and no TPU: see convstem_jax.preflight. Cycles are of the compiler's cost model, on
one device, in millions and without collectives.
"""

import itertools
import json
import os
import sys

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for a TPU that is not there

import jax

from benchmarks import arguments, jax_contenders
from benchmarks.jax_contenders import IMPLEMENTATIONS, OURS
from benchmarks.workload import recipe_of
from convstem_jax import build, files, tpu
from convstem_jax.errors import UserError
from convstem_jax.models import MODELS
from convstem_jax.sharding import Sharding
from convstem_jax.terminal import tell

WHAT = ("model", "topology", "batch_on_device", "implementation")  # what identifies a row


def estimate(
    implementation: str, model: str, topology: str, batch: int, known: dict | None = None
) -> dict | None:
    """Cycles and bytes of a device; None where the implementation has no such model.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        model: a key of `MODELS`.
        topology: a slice, as in preflight.
        batch: images on a device.
        known: an earlier estimate, returned again if program and versions are the same.
    """
    if (new := jax_contenders.new_model(implementation, model)) is None:
        return None
    slice_ = tpu.open_slice(topology)
    sharding = Sharding(slice_.devices)
    recipe = recipe_of("adamw")
    graphdef, state = jax_contenders.abstract_state(new, recipe)
    step = build.jit_train_step(sharding, graphdef, recipe, sharding.of_state(state))

    def replicated(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated), tree
        )

    data = jax_contenders.abstract_batch(model, batch * len(slice_.devices), sharding.batch)
    hparams = jax.eval_shape(jax_contenders.hparams)
    traced = step.trace(replicated(state), data, replicated(hparams))
    what = dict(zip(WHAT, (model, topology, batch, implementation), strict=True))
    return what | tpu.compile_step(traced, slice_, quick=False, known=known)


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table: cycles, and ours over each other implementation's."""
    found = {}
    for row in rows:
        if row["cycles"] is not None:
            what = row["model"], row["topology"], row["batch_on_device"]
            found.setdefault(what, {})[row["implementation"]] = row["cycles"]
    headers = ("model", "slice", "images on a device", OURS)
    headers += tuple(text for name in IMPLEMENTATIONS[1:] for text in (name, "our cycles over its"))
    lines = []
    for what, cycles in found.items():
        ours, line = cycles.get(OURS), [*what, _millions(cycles.get(OURS))]
        for name in IMPLEMENTATIONS[1:]:
            plain = cycles.get(name)
            line += [_millions(plain), f"{ours / plain:.2f}" if ours and plain else "–"]
        lines.append(line)
    return arguments.table(headers, lines, num_text=2)


def _millions(cycles: int | None) -> str:
    return f"{cycles / 1e6:.1f}" if cycles else "–"


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser(
        "tpu_cycles", __doc__,
        json="keep the estimates as a list of objects too, each once it is made; those that the "
        "file holds already are not made again where program and versions are still the same",
    )  # fmt: skip
    add = parser.add_argument
    add("--models", nargs="+", default=["vitc_4gf"], choices=MODELS, metavar="MODEL")
    add("--topology", nargs="+", default=["v5e:2x2"], metavar="NAME", help="as in preflight")
    add("--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS,
        metavar="NAME", help=f"of: {'; '.join(IMPLEMENTATIONS)} (default: all)")  # fmt: skip
    # TPUs compute in lanes of 128, and the stem's first layers lay the images along them.
    add("--batch", type=arguments.even, default=128,
        help="images on a device (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    known, rows = {}, []
    if args.json and os.path.exists(args.json):
        with open(args.json) as file:
            try:
                known = {tuple(row[name] for name in WHAT): row for row in json.load(file)}
            except (ValueError, KeyError, TypeError):
                parser.error(f"--json {args.json} holds something else: name another file")
    wanted = itertools.product(args.topology, args.models, args.implementations)
    try:
        for topology, model, name in wanted:
            print(f"{model}, {topology}, {name}", file=sys.stderr, flush=True)
            what = model, topology, args.batch, name
            row = estimate(name, model, topology, args.batch, known.get(what))
            if row is None:
                continue
            if row["cycles"] is None:
                print("left out: it does not fit, lower --batch", file=sys.stderr)
            rows.append(row)
            known[what] = row
            if args.json:  # an estimate takes minutes
                files.write_json(args.json, [*known.values()])
    except UserError as error:
        return tell(error)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
