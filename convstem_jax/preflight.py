"""Tells whether training fits a TPU slice and what it would cost there, without the slice.

    python -m convstem_jax.preflight --config configs/vitc.py:18gf --topology v5e:16x16
    python -m convstem_jax.preflight --config configs/vitc.py configs/vitp.py --topology v6e:8x8
    python -m convstem_jax.preflight --config configs/vitc.py --topology v5p:4x4x4 --format json

The real TPU compiler runs on this machine, on the very step that training would run. Its figures
for memory are what it would allocate; times are its estimate, plus the collectives' bytes at the
published speed of the links, and without reading the data.
"""

import json
import math
import os
import sys
import time

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX looks for a TPU that is not there

from flax import nnx
import jax
import jax.numpy as jnp
from tabulate import tabulate

from convstem_jax import build, files, tpu
from convstem_jax.complexity import complexity
from convstem_jax.config import load_config
from convstem_jax.errors import ConfigError, UserError, first_line
from convstem_jax.jaxprs import float32_products
from convstem_jax.lead import AHEAD
from convstem_jax.rules import validate
from convstem_jax.sharding import Sharding, bytes_on_device
from convstem_jax.terminal import new_parser, positive, tell, writable

GIB = 2**30
# Share of the memory that the largest batch may fill: its size is a linear estimate.
SAFE = 0.95
_TIMING = (
    "flops_per_chip", "collective_bytes", "collective_seconds", "step_seconds",
    "images_per_second", "mfu", "hours", "chip_hours",
)  # fmt: skip


def preflight(
    config,
    topology: str,
    *,
    num_classes: int,
    num_examples: int,
    quick: bool = False,
    known: dict | None = None,
) -> dict:
    """Compiles the configuration's training step for a slice.

    Args:
        config: see configs/common.py.
        topology: such as `v5e:16x16`.
        num_classes: of the data set, which need not be there.
        num_examples: of the data set, for the length of the schedule.
        quick: compile with the least effort: memory may be 15 % off, and no time is given.
        known: an earlier record; if its program is the same, it is not compiled again.

    Returns:
        A JSON-serialisable record; see docs/preflight.md. `compiled` is what the compiler said;
        everything else follows from it.

    Raises:
        ConfigError: the topology or a field is wrong.
        jax.errors.JaxRuntimeError: the compiler failed, and not for lack of memory.
    """
    validate(config)
    slice_ = tpu.open_slice(topology)
    num_devices = len(slice_.devices)
    build.check_batch(config, num_devices)
    sharding = Sharding(slice_.devices, config.state_sharding)
    traced, state = _trace(config, sharding, num_classes, num_examples)
    compiled = tpu.compile_step(traced, slice_, quick, known and known["compiled"])

    # ------------------------------------------------------------------------------- memory

    per_chip = num_devices // slice_.num_chips
    n, size = config.batch_size, config.image_size
    images = n // num_devices  # on one device
    parts = {
        name: bytes_on_device(getattr(state, name))
        for name in ("params", "batch_stats", "opt_state", "ema")
    }
    # What the loop keeps on the devices besides the batch of the step.
    ahead = config.prefetch * (n + config.eval_batch_size) + AHEAD * max(n, config.eval_batch_size)
    precise = n * build.num_precise_batches(config, num_examples) if state.batch_stats else 0
    parts["input"] = math.ceil((n + ahead + precise) / num_devices) * size**2 * 3
    beside = parts["input"] - images * size**2 * 3
    counts = complexity(nnx.eval_shape(lambda: build.new_model(config, num_classes, 0)))
    acts = jnp.dtype(config.dtype).itemsize * images // config.accumulate * counts.acts
    if compiled["bytes"]:
        need = compiled["bytes"] + beside
        parts["program"] = compiled["code_bytes"]
    else:  # the compiler names only the temporaries
        need = compiled["temporaries_needed"] + sum(parts.values())
    rest = need - sum(parts.values())
    parts["activations"] = max(0, min(acts, rest))
    parts["temporaries"] = max(0, rest - parts["activations"])
    has = compiled["device_bytes"]
    fits = compiled["bytes"] is not None and need <= has
    # What is not the state or the program grows in proportion to the images.
    free = SAFE * has - (need - rest - parts["input"])
    unit = config.accumulate * build.images_together(config)
    largest = max(0, int(free / (rest + parts["input"]) * images / unit)) * unit * num_devices
    record = {
        "config": f"{config.model}, {config.optimizer}, {config.epochs:g} epochs",
        "topology": topology,
        "chips": slice_.num_chips,
        "hosts": slice_.num_hosts,
        "batch_size": n,
        "accumulate": config.accumulate,
        "state_sharding": config.state_sharding,
        "compile_seconds": compiled["seconds"],
        "bytes_per_chip": need * per_chip,
        "chip_bytes": has * per_chip,
        "fits": fits,
        "parts": {name: size * per_chip for name, size in parts.items()},
        "largest_batch": largest,
        "remedy": None if fits else _remedy(config, num_devices, rest, free, parts),
        "float32_products": float32_products(traced.jaxpr.jaxpr),
        "quick": quick,
        "compiled": compiled,
    }

    # --------------------------------------------------------------------------------- time

    timing = dict.fromkeys(_TIMING)
    if compiled["bytes"]:
        collectives = compiled["collectives"]
        timing |= {
            # The compiler counts the loop over micro-batches, nearly all of the work, once.
            "flops_per_chip": compiled["flops"] * config.accumulate * per_chip,
            "collective_bytes": per_chip * sum(size for _, size in collectives.values()),
        }
        if not quick:
            waiting = tpu.collective_seconds(slice_, collectives)
            step_seconds = compiled["cycles"] / slice_.chip.clock + waiting
            hours = build.num_steps(config, num_examples) * step_seconds / 3600
            timing |= {
                "collective_seconds": waiting,
                "step_seconds": step_seconds,
                "images_per_second": n / step_seconds,
                # A multiply-add is two operations; the backward pass costs twice the forward one.
                "mfu": 6 * n * counts.flops / step_seconds / (slice_.num_chips * slice_.chip.flops),
                "hours": hours,
                "chip_hours": hours * slice_.num_chips,
            }
    return record | timing


def _trace(config, sharding: Sharding, num_classes: int, num_examples: int):
    """The traced training step, and the shapes of its state, with shardings."""
    recipe = build.recipe(config, num_classes)
    graphdef, new_state = build.new_state(config, recipe)

    def shapes(function, *args, shardings):
        return jax.eval_shape(jax.jit(function, out_shardings=shardings), *args)

    hparams = shapes(lambda: build.hparams(config, num_examples), shardings=sharding.replicated)
    shardings = sharding.of_state(jax.eval_shape(new_state, hparams.seed))
    state = shapes(new_state, hparams.seed, shardings=shardings)
    n, size = config.batch_size, config.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((n, size, size, 3), jnp.uint8, sharding=sharding.batch),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding.batch),
    }
    step = build.jit_train_step(sharding, graphdef, recipe, shardings)
    return step.trace(state, batch, hparams), state


def _remedy(config, num_devices: int, rest: int, free: float, parts: dict[str, int]) -> str:
    """Which fields to change where the memory is too small.

    Splitting the state comes first, since it changes results only by rounding.

    Args:
        config: the configuration that does not fit.
        num_devices: of the slice.
        rest: bytes of activations and temporaries on a device.
        free: bytes of a device for them and the input.
        parts: bytes of each part of the memory on a device, by name.
    """
    images, together = config.batch_size // num_devices, build.images_together(config)
    state = parts["params"] + parts["opt_state"] + parts["ema"]
    rooms = {"": free}
    if config.state_sharding == "replicated" and num_devices > 1:
        rooms["config.state_sharding=fsdp"] = free + state * (1 - 1 / num_devices)

    def fits(room, accumulate):
        return rest * config.accumulate / accumulate + parts["input"] <= room

    for words, room in rooms.items():
        if words and fits(room, config.accumulate):
            return f"set {words}"
    for words, room in rooms.items():
        for accumulate in range(config.accumulate + 1, images + 1):
            if images % (accumulate * together) == 0 and fits(room, accumulate):
                return " and ".join(filter(None, [f"set config.accumulate={accumulate}", words]))
    return "take more chips, or set a smaller config.batch_size"


# ------------------------------------------------------------------------------------- output


def describe(record: dict) -> str:
    """One record in words."""
    per_chip, has = record["bytes_per_chip"], record["chip_bytes"]
    lines = [
        f"{record['config']} on {record['topology']}: {record['chips']} chips, "
        f"{record['hosts']} hosts, batch {record['batch_size']:,}"
        + (f" in {record['accumulate']} micro-batches" if record["accumulate"] > 1 else "")
        + f", state {record['state_sharding']}",
        f"compiled in {record['compile_seconds']:.0f} s",
        "",
        f"memory of a chip  {per_chip / GIB:8.2f} of {has / GIB:.2f} GiB: "
        + ("fits" if record["fits"] else f"does not fit: {record['remedy']}"),
    ]
    lines += [f"  {name:15} {size / GIB:8.2f}" for name, size in record["parts"].items()]
    lines.append(f"  largest batch that fits: about {record['largest_batch']:,}")
    if record["flops_per_chip"] is not None:
        lines += ["", f"a step, on each chip {record['flops_per_chip'] / 1e12:10.2f} Tflop"]
        lines += [
            f"  {kind:18} {size / 2**20:12,.1f} MiB on each device, in {count}"
            for kind, (count, size) in record["compiled"]["collectives"].items()
        ]
    if record["step_seconds"] is not None:
        lines += [
            "",
            "as the compiler estimates, the input left out:",
            f"  step            {1000 * record['step_seconds']:,.1f} ms, of them "
            f"{1000 * record['collective_seconds']:.1f} in collectives if nothing hides them",
            f"  speed           {record['images_per_second']:,.0f} images/s, "
            f"{record['images_per_second'] / record['hosts']:,.0f} on each host to read",
            f"  MFU             {100 * record['mfu']:.1f} % of the bfloat16 peak",
            f"  whole schedule  {record['hours']:.1f} h, {record['chip_hours']:,.0f} chip-hours",
        ]
    lines += ["", "matrix products with a float32 operand:"]
    lines += [f"  {n:4} of {types}" for types, n in record["float32_products"].items()] or [
        "  none"
    ]
    return "\n".join([*lines, ""])


_HEADERS = (
    "run", "slice", "chips", "batch", "micro-batches", "GiB of a chip", "fits", "largest batch",
    "compile (s)", "step (ms)", "images/s", "MFU (%)", "collectives (MiB)", "hours", "chip-hours",
)  # fmt: skip


def table(records: list[dict], tablefmt: str) -> str:
    """The records as a table, one line each."""

    def number(value, factor=1.0, form=",.0f"):
        return "–" if value is None else format(factor * value, form)

    lines = [
        (
            r["config"], r["topology"], r["chips"], number(r["batch_size"]), r["accumulate"],
            f"{r['bytes_per_chip'] / GIB:.1f} of {r['chip_bytes'] / GIB:.1f}",
            "yes" if r["fits"] else f"no: {r['remedy']}", number(r["largest_batch"]),
            number(r["compile_seconds"]), number(r["step_seconds"], 1000, ",.1f"),
            number(r["images_per_second"]), number(r["mfu"], 100, ".1f"),
            number(r["collective_bytes"], 2**-20), number(r["hours"], 1, ",.2f"),
            number(r["chip_hours"]),
        )
        for r in records
    ]  # fmt: skip
    align = ["left", "left", *["right"] * 4, "left", *["right"] * 8]
    return tabulate(lines, _HEADERS, tablefmt, disable_numparse=True, colalign=align)


def main(argv: list[str] | None = None) -> int:
    """Compiles and prints; returns the exit status."""
    parser = new_parser(
        "convstem_jax.preflight",
        __doc__,
        epilog="exit status: 0 all fit · 1 the compiler failed · 2 configuration, topology or no "
        "libtpu · 6 some do not fit",
    )
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE[:ARG]",
        help="configurations, with fields after the colon: configs/vitc.py:18gf,accumulate=2",
    )  # fmt: skip
    parser.add_argument(
        "--topology", nargs="+", required=True, metavar="NAME",
        help="slices, as generation and chips along each axis: v3:2x2 (v3-8), v4:2x2x4 (v4-32), "
        "v5e:16x16 (v5litepod-256), v5p:4x4x4 (v5p-128), v6e:8x8 (v6e-64)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="compile three times faster with the least effort: memory may be 15 %% off, and no "
        "time is estimated",
    )  # fmt: skip
    parser.add_argument("--num_classes", type=positive, default=1000, help="default: %(default)s")
    parser.add_argument(
        "--num_examples", type=positive, default=1_281_167,
        help="in an epoch (default: %(default)s, ImageNet's)",
    )  # fmt: skip
    parser.add_argument(
        "--records", type=writable, metavar="FILE",
        help="file of JSON lines that keeps the results: a program in it is not compiled again",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("text", "markdown", "json"), default="text",
        help="text: in words, a table where there are several; json: a list of objects, in bytes "
        "and seconds (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        records, failed = _records(args)
    except UserError as error:
        return tell(error)
    if args.format == "json":
        print(json.dumps(records, indent=2))
    elif args.format == "markdown":
        print(table(records, "github"))
    elif records:
        print(describe(records[0]) if len(records) == 1 else table(records, "simple"))
    if failed:
        return 1
    return 0 if all(record["fits"] for record in records) else 6


def _records(args) -> tuple[list[dict], bool]:
    """The records asked for, and whether the compiler failed for any of them."""
    wanted = [(spec, topology) for topology in args.topology for spec in args.config]
    for spec in args.config:
        validate(load_config(spec))
    for topology in args.topology:
        tpu.open_slice(topology)
    known, records, start = _read_records(args.records), [], time.perf_counter()
    for i, (spec, topology) in enumerate(wanted):
        minutes = (time.perf_counter() - start) / max(1, i) * (len(wanted) - i) / 60
        left = f", about {minutes:.0f} min left" if i else ""
        print(f"{i + 1}/{len(wanted)}  {spec} for {topology}{left}", file=sys.stderr, flush=True)
        key = spec, topology, args.quick
        try:
            record = preflight(
                load_config(spec), topology, num_classes=args.num_classes,
                num_examples=args.num_examples, quick=args.quick, known=known.get(key),
            )  # fmt: skip
        except jax.errors.JaxRuntimeError as error:
            print(f"error: the compiler failed at it: {first_line(error)}", file=sys.stderr)
            continue
        records.append({"spec": spec} | record)
        known[key] = records[-1]
        if args.records:
            files.write_jsonl(args.records, known.values())
    return records, len(records) < len(wanted)


def _read_records(path: str | None) -> dict[tuple[str, str, bool], dict]:
    """Earlier records, by configuration, topology and whether they are quick."""
    if path is None or not os.path.exists(path):
        return {}
    with open(path) as file:
        try:
            records = [json.loads(line) for line in file]
            return {(r["spec"], r["topology"], r["quick"]): r for r in records}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--records {path} holds something else ({first_line(error)}): name another file"
            ) from error


if __name__ == "__main__":
    sys.exit(main())
