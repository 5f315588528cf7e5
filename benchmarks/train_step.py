"""Times whole training steps of this project and of its peers, in one run.

    python -m benchmarks.train_step                               ViT_C-4GF, on the device here
    python -m benchmarks.train_step --models vitc_1gf vitc_18gf --batch 512 --json results.json

A step is what training makes: normalisation of uint8 images, lighting, mixing, forward, backward,
optimiser, EMA; the batch waits on the device. The implementations take turns --repeats times;
medians are printed, of ratios too. What is not installed is named and left out. MFU is the share of
what this device reaches with products of large bfloat16 matrices, measured in the same run.
"""

import argparse
import json
import os
import platform
import sys
import time

# Both frameworks share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from flax import nnx
import jax
import numpy as np
from tabulate import tabulate

from benchmarks import jax_contenders, torch_contenders
from convstem_jax import run_folder
from convstem_jax.complexity import complexity
from convstem_jax.models import MODELS, create_model
from convstem_jax.optim import OPTIMIZERS

JAX = jax_contenders.IMPLEMENTATIONS
OURS = JAX[0]
TORCH = ("torchvision", "timm")


def contenders(model: str, args, images: np.ndarray, labels: np.ndarray) -> list:
    """Every implementation that has the model and is installed, compiled."""
    found = []
    for name in args.implementations:
        if name in JAX:
            step = jax_contenders.JaxStep.make(name, model, args.optimizer, images, labels)
        elif reason := torch_contenders.unavailable(name):
            print(f"left out: {name} ({reason})", file=sys.stderr)
            continue
        elif (new := torch_contenders.new_network(name, model)) is None:
            step = None
        else:
            step = torch_contenders.TorchStep(
                name, new(), args.optimizer, images, labels, args.torch_mode
            )
        if step is None:
            print(f"left out: {name}, which has no {model}", file=sys.stderr)
        else:
            print(f"{model}, {name}: compiled in {step.compile_seconds:.0f} s", file=sys.stderr)
            found.append(step)
    return found


def measure(model: str, args, peak: float) -> list[dict]:
    """A row for each implementation of the model."""
    size, rng = MODELS[model].image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (args.batch, size, size, 3), np.uint8)
    labels = rng.integers(0, torch_contenders.NUM_CLASSES, args.batch).astype(np.int32)
    torch_contenders.forget()
    steps = contenders(model, args, images, labels)
    seconds = np.zeros((args.repeats, len(steps)))
    for step in steps:
        if not np.isfinite(step.run(1)):
            raise RuntimeError(f"the loss of {step.name} is not finite")
    for turn in seconds:
        for i, step in enumerate(steps):
            start = time.perf_counter()
            step.run(args.steps)
            turn[i] = (time.perf_counter() - start) / args.steps
    flops = complexity(nnx.eval_shape(lambda: create_model(model, rngs=nnx.Rngs(0)))).flops
    names = [step.name for step in steps]
    ours = seconds[:, names.index(OURS)] if OURS in names else None
    return [
        {
            "model": model,
            "implementation": step.name,
            "device": jax.devices()[0].device_kind,
            "batch": args.batch,
            "optimizer": args.optimizer,
            "images_per_second": args.batch / np.median(seconds[:, i]),
            "speed_over_its": None if ours is None else float(np.median(seconds[:, i] / ours)),
            "mfu": 6 * flops * args.batch / np.median(seconds[:, i]) / peak,
            "peak_bytes": step.peak_bytes,
            "compile_seconds": round(step.compile_seconds, 1),
        }
        for i, step in enumerate(steps)
    ]


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
    add("--batch", type=int, default=256, help="default: %(default)s; must be even")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="default: %(default)s")
    add("--steps", type=int, default=20, help="of each turn (default: %(default)s)")
    add("--repeats", type=int, default=5, help="default: %(default)s")
    add("--torch_mode", default="max-autotune", help="of torch.compile, or eager (%(default)s)")
    add("--matmul_size", type=int, default=8192, help="for the peak (default: %(default)s)")
    add("--json", metavar="FILE", help="write the table as a list of objects too")
    args = parser.parse_args(argv)
    if args.batch < 2 or args.batch % 2:
        parser.error(f"--batch {args.batch} must be even: images are mixed in pairs")
    for name in ("steps", "repeats", "matmul_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")

    peak = jax_contenders.matmul_flops(args.matmul_size)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"Python {platform.python_version()}: {peak / 1e12:.2f} Tflop/s in bfloat16 products of "
        f"{args.matmul_size} x {args.matmul_size} matrices",
        file=sys.stderr,
    )
    rows = []
    for model in args.models:
        rows += measure(model, args, peak)
    print(table(rows))
    if args.json:
        about = {
            "matmul_flops": peak, "command": argv or sys.argv[1:], "commit": run_folder.commit(),
            "steps": args.steps, "repeats": args.repeats, "torch_mode": args.torch_mode,
            "versions": run_folder.versions() | torch_contenders.versions(),
        }  # fmt: skip
        with open(args.json, "w") as file:
            json.dump([row | about for row in rows], file, indent=2)
            file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
