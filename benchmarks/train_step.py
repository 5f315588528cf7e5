"""Times whole training steps of this project and of its peers, in one run.

    python -m benchmarks.train_step                               ViT_C-4GF, on the device here
    python -m benchmarks.train_step --models vitc_1gf vitc_18gf --batch 512 --json results.json

A step is what training makes: normalisation of uint8 images, lighting, mixing, forward, backward,
optimiser, EMA; the batch waits on the device. Each implementation has a process of its own. When
all are compiled, those of a model take turns --repeats times; medians are printed, of ratios too.
What is not installed is named and left out. MFU is the share of what this device reaches with
products of large bfloat16 matrices, measured in the same run.
"""

import argparse
from collections.abc import Callable
import fnmatch
import json
import platform
import sys

from flax import nnx
import jax
import numpy as np
from tabulate import tabulate

from benchmarks import jax_contenders, torch_contenders
from benchmarks.contenders import JAX, OURS, TORCH, Contender, all_compiled, missing
from convstem_jax import run_folder
from convstem_jax.complexity import complexity
from convstem_jax.models import MODELS, create_model
from convstem_jax.optim import OPTIMIZERS


def measure(contenders: list[Contender], args, peak: float, leave_out: Callable) -> list[dict]:
    """A row for each implementation of one model; its process ends.

    Args:
        contenders: the implementations, compiled.
        args: of the command line.
        peak: operations a second that the device reaches.
        leave_out: is told of each that fails, and why.
    """
    seconds = {contender: [] for contender in contenders}
    for _ in range(args.repeats):
        for contender in list(seconds):
            try:
                seconds[contender].append(contender.seconds(args.steps))
            except RuntimeError as error:
                del seconds[contender]
                leave_out(contender, error)
    for contender in contenders:
        contender.end()
    model = contenders[0].model
    flops = complexity(nnx.eval_shape(lambda: create_model(model, rngs=nnx.Rngs(0)))).flops
    ours = [np.array(s) for contender, s in seconds.items() if contender.implementation == OURS]
    rows = []
    for contender, its in seconds.items():
        images_per_second = contender.batch / np.median(its)
        rows.append({
            "model": model,
            "implementation": contender.implementation,
            "device": jax.devices()[0].device_kind,
            "batch": contender.batch,
            "optimizer": args.optimizer,
            "images_per_second": images_per_second,
            "speed_over_its": float(np.median(its / ours[0])) if ours else None,
            "mfu": 6 * flops * images_per_second / peak,
            "peak_bytes": contender.peak_bytes,
            "compile_seconds": round(contender.compile_seconds, 1),
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """The rows for people."""
    headers = ("model", "implementation", "batch", "images/s", "our speed over its", "MFU (%)")
    headers += ("peak GiB", "compile (s)")
    lines = [
        (
            row["model"], row["implementation"], row["batch"], f"{row['images_per_second']:,.1f}",
            "–" if row["speed_over_its"] is None else f"{row['speed_over_its']:.2f}",
            f"{100 * row['mfu']:.1f}",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['compile_seconds']:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    align = ["left", "left", *["right"] * 6]
    return tabulate(lines, headers, "github", disable_numparse=True, colalign=align)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=["vitc_4gf"], choices=MODELS, metavar="MODEL",
        help="as in convstem_jax.create_model (default: vitc_4gf)")  # fmt: skip
    add("--implementations", nargs="+", default=[*JAX, *TORCH], choices=[*JAX, *TORCH],
        metavar="NAME", help=f"of: {'; '.join([*JAX, *TORCH])} (default: all)")  # fmt: skip
    add("--skip", nargs="+", default=[], metavar="MODEL:NAME",
        help="of these, patterns such as 'vitp_*:*float32'")  # fmt: skip
    add("--batch", type=int, nargs="+", default=[256],
        help="of all models, or of each; must be even (default: 256)")  # fmt: skip
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="default: %(default)s")
    add("--steps", type=int, default=20, help="of each turn (default: %(default)s)")
    add("--repeats", type=int, default=5, help="default: %(default)s")
    add("--torch_mode", default="max-autotune", help="of torch.compile, or eager (%(default)s)")
    add("--at_once", type=int, default=1, help="how many compile at the same time, which is "
        "sooner done, but disturbs what compilers measure (default: %(default)s)")  # fmt: skip
    add("--compile_limit", type=float, metavar="SECONDS",
        help="leave out what is not compiled by then (default: wait)")  # fmt: skip
    add("--matmul_size", type=int, default=8192, help="for the peak (default: %(default)s)")
    add("--json", metavar="FILE", help="write the table as a list of objects too")
    args = parser.parse_args(argv)
    if len(args.batch) == 1:
        args.batch *= len(args.models)
    if len(args.batch) != len(args.models):
        parser.error(f"--batch has {len(args.batch)} sizes for {len(args.models)} models")
    if len(set(args.models)) < len(args.models):
        parser.error("--models names one twice")
    for batch in args.batch:
        if batch < 2 or batch % 2:
            parser.error(f"--batch {batch} must be even: images are mixed in pairs")
    for name in ("steps", "repeats", "matmul_size", "at_once"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")

    failed = []

    def leave_out(what, reason):
        print(f"left out: {what}: {reason}", file=sys.stderr)
        failed.append(what)

    wanted = []
    for model, batch in zip(args.models, args.batch, strict=True):
        for name in args.implementations:
            if any(fnmatch.fnmatch(f"{model}:{name}", pattern) for pattern in args.skip):
                continue
            if reason := missing(model, name):
                print(f"left out: {name}, {model}: {reason}", file=sys.stderr)
            else:
                wanted.append((model, name, batch))
    contenders = all_compiled(wanted, args, leave_out)
    peak = jax_contenders.matmul_flops(args.matmul_size)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"Python {platform.python_version()}: {peak / 1e12:.2f} Tflop/s in bfloat16 products of "
        f"{args.matmul_size} x {args.matmul_size} matrices",
        file=sys.stderr,
    )
    about = {
        "matmul_flops": peak, "command": argv or sys.argv[1:], "commit": run_folder.commit(),
        "steps": args.steps, "repeats": args.repeats, "torch_mode": args.torch_mode,
        "versions": run_folder.versions() | torch_contenders.versions(),
    }  # fmt: skip
    rows = []
    for model in args.models:
        if of_model := [x for x in contenders if x.model == model]:
            of_model.sort(key=lambda x: args.implementations.index(x.implementation))
            rows += measure(of_model, args, peak, leave_out)
        if args.json:
            with open(args.json, "w") as file:
                json.dump([row | about for row in rows], file, indent=2)
                file.write("\n")
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
