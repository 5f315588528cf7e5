"""How fast a training step can be: what it computes and moves, against a device's two ceilings.

    python -m benchmarks.roofline                                  the device here, measured
    python -m benchmarks.roofline --measured train_step.json       and the share reached
    python -m benchmarks.roofline --device "NVIDIA H200" --flops 790e12 --bandwidth 4.3e12

What is counted is this project's step in bfloat16, under ordinary XLA fusion. Each matrix product
and convolution is a kernel that reads its operands and writes its result. What is computed element
by element between them is fused, reductions included: a kernel reads each array that it needs once
and writes what a product or another reduction needs, and sums of two arrays that are read twice.
If only this kernel reads a product's result, it is one kernel with the product. A kernel takes the
time of its operations at the one ceiling or of its bytes at the other, whichever is longer; kernels
do not overlap. On GPUs attention is counted as cuDNN's, whose weights never leave the chip, and
this project's own kernels as what XLA would make in their place. Better fusion than that can beat
the bound.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import json
import math
import sys
from unittest import mock

import jax
from jax.extend import core

from benchmarks import arguments, ceilings, jax_contenders
from benchmarks.jax_contenders import OURS
from benchmarks.workload import recipe_of
from convstem_jax import files
from convstem_jax.jaxprs import inner_programs, multiply_adds
from convstem_jax.models import MODELS
from convstem_jax.models import kernels as kernels_for_gpus
from convstem_jax.models.attention import attend
from convstem_jax.models.vit import ViTSpec
from convstem_jax.step import train_step

PAPER = [f"vit{stem}_{size}gf" for size in (1, 4, 18, 36) for stem in "cp"]
# These cost nothing: at best, what comes before them writes in their order.
VIEWS = ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy")
VIEWS += ("layout_constraint",)
# Programs inside an instruction that run once, on its operands.
CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "shard_map")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Operations and bytes of one kernel."""

    flops: float
    bytes: float


@dataclasses.dataclass(eq=False)
class _Array:
    """A value of a program; two are the same only where they are one object."""

    bytes: int


@dataclasses.dataclass
class _Instruction:
    name: str
    inputs: list[_Array]
    outputs: list[_Array]
    flops: float  # of a product; 0 for others

    @property
    def is_product(self) -> bool:
        return self.name in ("dot_general", "conv_general_dilated")

    @property
    def is_reduction(self) -> bool:
        return self.name.startswith("reduce_") and self.name != "reduce_precision"

    @property
    def is_of_arrays(self) -> bool:
        """Whether there are two operands, each at least half as large as the result."""
        sizes = [x.bytes for x in self.inputs]
        return len(sizes) == 2 and 2 * min(sizes) >= self.outputs[0].bytes


def kernels(jaxpr: core.Jaxpr, *, on_chip: Callable = lambda shape: False) -> list[Kernel]:
    """The kernels of a program, fused as the top of this file says.

    Args:
        jaxpr: the program.
        on_chip: whether an array of a shape never leaves the chip.
    """

    def new(variable) -> _Array:
        aval = variable.aval
        size = math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)
        return _Array(0 if on_chip(aval.shape) else size)

    instructions, results = _flatten(jaxpr, [new(v) for v in jaxpr.invars], new)
    maker = {id(out): made for made in instructions for out in made.outputs}
    stored = {id(x): x for made in instructions if made.is_product for x in made.inputs}
    stored |= {id(x): x for x in results if x is not None}
    readers = Counter(id(x) for made in instructions for x in made.inputs)
    # The residual stream and its gradient.
    sums = (m for m in instructions if m.name in ("add", "add_any"))
    stored |= {id(x): x for m in sums for x in m.outputs if readers[id(x)] > 1 and m.is_of_arrays}
    stored |= {id(x): x for m in instructions if m.is_product or m.is_reduction for x in m.outputs}

    @functools.cache
    def sources(array_id: int) -> frozenset[int]:
        """Stored arrays from which a stored or an intermediate one is computed."""
        if array_id not in maker:
            return frozenset()
        inputs = {id(x): x for x in maker[array_id].inputs}
        known.update(inputs)
        leaves = {i for i in inputs if i in stored or i not in maker}
        return frozenset(leaves.union(*(sources(i) for i in inputs if i not in leaves)))

    known, fused, products = dict(stored), {}, {}
    for made in instructions:
        if made.is_product:
            products[id(made.outputs[0])] = made
            continue
        for out in made.outputs:
            read = sources(id(out))  # of each in turn, or the recursion would be deep
            if id(out) in stored:  # what reads the same arrays is one kernel
                fused.setdefault(read, []).append(out)
    reads = Counter(i for group in fused for i in group)
    reads += Counter(id(x) for made in products.values() for x in made.inputs)
    found = []
    for group, outputs in fused.items():
        arrays = [known[i] for i in group] + outputs
        behind = next((i for i in group if i in products and reads[i] == 1), None)
        flops = 0.0
        if behind is not None:  # the product's result goes no further than this kernel
            product = products.pop(behind)
            arrays += product.inputs
            arrays.remove(product.outputs[0])
            flops = product.flops
        found.append(Kernel(flops, sum(x.bytes for x in arrays)))
    for product in products.values():
        found.append(Kernel(product.flops, sum(x.bytes for x in product.inputs + product.outputs)))
    return found


def _flatten(jaxpr, arrays: list, new: Callable) -> tuple[list[_Instruction], list]:
    """Instructions with the calls inlined, and what the program returns (None for a literal).

    Args:
        jaxpr: the program.
        arrays: its inputs.
        new: makes the array of a variable.
    """
    values = dict(zip(jaxpr.invars, arrays, strict=True))

    def read(variables: Iterable) -> Iterator[_Array | None]:
        for v in variables:
            if isinstance(v, core.Literal):
                yield None
            else:
                yield values.setdefault(v, new(v))

    found = []
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, list(read(eqn.invars))
        if name in CALLS:
            program = next(inner_programs(eqn))
            inside, outputs = _flatten(program, inputs, new)
            found += inside
            outputs = [x or _Array(0) for x in outputs]
        elif name in VIEWS and inputs[0] is not None:
            outputs = inputs[:1]
        elif name == "convert_element_type" and inputs[0] is not None:  # perhaps of a view
            old, new_type = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
            outputs = [_Array(inputs[0].bytes * new_type.itemsize // old.itemsize)]
            found.append(_Instruction(name, inputs, outputs, 0))
        else:
            outputs = [new(v) for v in eqn.outvars]
            found.append(
                _Instruction(
                    name, [x for x in inputs if x is not None], outputs, 2 * multiply_adds(eqn)
                )
            )
        values |= dict(zip(eqn.outvars, outputs, strict=True))
    return found, list(read(jaxpr.outvars))


def step_kernels(model: str, batch: int, device_kind: str) -> list[Kernel]:
    """The kernels of a whole training step of the paper's recipe, AdamW, for a kind of device."""
    platform = {"TPU": "tpu", "cpu": "cpu"}.get(device_kind[:3], "gpu")
    device = jax.sharding.AbstractDevice(device_kind, num_cores=None, platform=platform)
    recipe = recipe_of("adamw")
    new = jax_contenders.new_model(OURS, model)
    graphdef, state = jax_contenders.abstract_state(new, recipe)
    data = jax_contenders.abstract_batch(model, batch)
    step = functools.partial(train_step, graphdef, recipe)
    with _traced_for(device):
        jaxpr = jax.make_jaxpr(step)(state, data, jax.eval_shape(jax_contenders.hparams)).jaxpr
    spec = MODELS[model]
    if platform != "gpu" or not isinstance(spec, ViTSpec):
        return kernels(jaxpr)
    num_tokens = (spec.image_size // spec.patch_size) ** 2 + 1
    num_tokens += num_tokens % 2  # see `attend_fused`
    return kernels(jaxpr, on_chip=lambda shape: shape.count(num_tokens) == 2)


@contextlib.contextmanager
def _traced_for(device: jax.sharding.AbstractDevice) -> Iterator[None]:
    """A context where the models take their forms for such a device, which need not be here."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=auto, abstract_device=device)

    def cudnns(q, k, v, **_):
        # JAX traces cuDNN's attention only where cuDNN is. This has the same products.
        return attend(*(x.transpose(0, 2, 3, 1) for x in (q, k, v))).transpose(0, 3, 1, 2)

    attention = mock.patch.object(jax.nn, "dot_product_attention", cudnns)
    no_kernels = mock.patch.object(kernels_for_gpus, "are_used", lambda x: False)
    with jax.sharding.use_abstract_mesh(mesh), attention, no_kernels:
        yield


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser("roofline", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, metavar="MODEL",
        help="default: the paper's ViTs, or those of --measured")  # fmt: skip
    add("--batch", type=arguments.even, default=256,
        help="must be even; default: %(default)s, or that of --measured")  # fmt: skip
    add("--flops", type=float, help="bfloat16 operations a second (default: measured here)")
    add("--bandwidth", type=float, help="bytes a second (default: measured here)")
    add("--measured", nargs="+", default=[], metavar="FILE",
        help="results of benchmarks.train_step, for the share that it reached")  # fmt: skip
    add("--device", metavar="KIND", help="as JAX calls it, for the models' forms (default: that of "
        "--measured, or the one here)")  # fmt: skip
    args = parser.parse_args(argv)
    measured, kinds, here = {}, set(), jax.devices()[0].device_kind
    for name in args.measured:
        try:
            with open(name) as file:
                rows = [row for row in json.load(file) if row["implementation"] == OURS]
            kinds |= {row["device"] for row in rows}
            # Rows of earlier versions, which had only bfloat16, do not name it.
            others = {(row.get("dtype", "bfloat16"), row["optimizer"]) for row in rows}
            others -= {("bfloat16", "adamw")}
            measured |= {row["model"]: row for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--measured {name} is not from benchmarks.train_step: {error!r}")
        if others:
            what = " and ".join(min(others))
            parser.error(f"--measured {name} has {what}: the bound is of bfloat16 and adamw")
    if unknown := measured.keys() - MODELS.keys():
        parser.error(f"--measured has {min(unknown)}, which is no model of this version")
    if len(kinds) > 1:
        parser.error(f"--measured has rows of {' and '.join(sorted(kinds))}: give one device's")
    kind = args.device or next(iter(kinds), here)
    if kind != here and not (args.flops and args.bandwidth):
        parser.error(
            f"the bound of {kind} is wanted, and this is {here}: give --flops and --bandwidth of it"
        )
    for name in ("flops", "bandwidth"):
        if (value := getattr(args, name)) is not None and not value > 0:
            parser.error(f"--{name} {value:g} must be more than 0")
    if not (args.flops and args.bandwidth):
        print(
            f"measuring the ceilings of {here}; --flops and --bandwidth give them", file=sys.stderr
        )
    flops = args.flops or ceilings.matmul_flops(ceilings.matmul_size())
    speed = args.bandwidth or ceilings.bandwidth()
    rows = []
    for model in args.models or list(measured) or PAPER:
        batch = measured.get(model, {}).get("batch", args.batch)
        found = step_kernels(model, batch, kind)
        seconds = sum(max(k.flops / flops, k.bytes / speed) for k in found)
        bound = batch / seconds
        reached = measured.get(model, {}).get("images_per_second")
        rows.append({
            "model": model, "device": kind, "batch": batch,
            "flops_limit": flops, "bytes_limit": speed,
            "flops": sum(k.flops for k in found), "bytes": sum(k.bytes for k in found),
            "bound_images_per_second": bound, "images_per_second": reached,
            "reached": reached and reached / bound,
            "measured_at": measured.get(model, {}).get("commit"),
        })  # fmt: skip
    print(f"{flops / 1e12:,.3g} Tflop/s in bfloat16, {speed / 1e12:.2f} TB/s\n")
    print(table(rows))
    if args.json:
        about = arguments.made_by(argv)
        files.write_json(args.json, [row | about for row in rows])
    return 0


def _gflop(flops: float) -> str:
    return f"{flops / 1e9:.{1 if flops > 1e9 else 3}f}"


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        (
            row["model"], row["batch"], _gflop(row["flops"] / row["batch"]),
            f"{row['bytes'] / row['batch'] / 1e6:.0f}", f"{row['bound_images_per_second']:,.0f}",
            "–" if row["reached"] is None else f"{row['images_per_second']:,.0f}",
            "–" if row["reached"] is None else f"{100 * row['reached']:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    headers = ("model", "batch", "Gflop an image", "MB an image", "bound (images/s)")
    headers += ("measured (images/s)", "reached (%)")
    return arguments.table(headers, lines)


if __name__ == "__main__":
    sys.exit(main())
