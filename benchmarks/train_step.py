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
import fnmatch
import json
import multiprocessing
from multiprocessing import connection
import os
import platform
import sys
import time

# All processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from flax import nnx
import jax
import numpy as np
from tabulate import tabulate

from benchmarks import jax_contenders, torch_contenders
from convstem_jax import run_folder
from convstem_jax.complexity import complexity
from convstem_jax.errors import first_line
from convstem_jax.models import MODELS, create_model
from convstem_jax.optim import OPTIMIZERS

JAX = jax_contenders.IMPLEMENTATIONS
OURS = JAX[0]
TORCH = ("torchvision", "timm")


class Contender:
    """An implementation of a model, in a process of its own.

    Args:
        model: a key of `MODELS`.
        implementation: of `JAX` or `TORCH`.
        batch: images of a step.
        args: of the command line.
        compiling: a semaphore: how many may compile at once.
    """

    def __init__(self, model: str, implementation: str, batch: int, args, compiling):
        self.model, self.implementation, self.batch = model, implementation, batch
        processes = multiprocessing.get_context("spawn")
        self.pipe, other = processes.Pipe()
        given = (other, compiling, model, implementation, batch, args)
        self._process = processes.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        other.close()
        self.peak_bytes, self.compile_seconds = None, None

    def wait(self, seconds: float | None) -> str | None:
        """Waits until it is compiled; returns why it is not, if it is not."""
        if not self.pipe.poll(seconds):
            return self._leave("it was not compiled in time")
        try:
            said = self.pipe.recv()
        except EOFError:
            return self._leave("its process died")
        if isinstance(said, str):
            return self._leave(said)
        self.compile_seconds, self.peak_bytes = said
        return None

    def _leave(self, reason: str) -> str:
        self._process.kill()
        return reason

    def seconds(self, num_steps: int) -> float:
        """Of that many steps, each.

        Raises:
            RuntimeError: the loss is not finite, or a step failed.
        """
        self.pipe.send(num_steps)
        try:
            loss, seconds = self.pipe.recv()
        except (EOFError, ValueError) as error:
            raise RuntimeError(f"{self.model}, {self.implementation}: a step failed") from error
        if not np.isfinite(loss):
            raise RuntimeError(f"{self.model}, {self.implementation}: the loss is {loss}")
        return seconds / num_steps

    def close(self) -> None:
        """Ends the process, which gives its memory back."""
        self.pipe.send(0)
        self._process.join()


def _serve(pipe: connection.Connection, compiling, model, implementation, batch, args) -> None:
    """What a contender's process does: compiles, and makes steps whenever it is told how many."""
    size, rng = MODELS[model].image_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    labels = rng.integers(0, torch_contenders.NUM_CLASSES, batch).astype(np.int32)
    try:
        with compiling:
            if implementation in JAX:
                step = jax_contenders.JaxStep.make(
                    implementation, model, args.optimizer, images, labels
                )
            else:
                step = torch_contenders.TorchStep.make(
                    implementation, model, args.optimizer, images, labels, args.torch_mode
                )
    except Exception as error:  # The others go on without it.
        pipe.send(first_line(error))
        return
    pipe.send((step.compile_seconds, step.peak_bytes))
    while num_steps := pipe.recv():
        start = time.perf_counter()
        loss = step.run(num_steps)
        pipe.send((loss, time.perf_counter() - start))


def compiled(args) -> tuple[list[Contender], bool]:
    """Every implementation of every model that has it and is installed, ready to be timed.

    Returns:
        They, and whether one is not among them that should be.
    """
    start, found = time.perf_counter(), []
    compiling = multiprocessing.get_context("spawn").Semaphore(args.at_once)
    wanted = [
        (model, batch, implementation)
        for model, batch in zip(args.models, args.batch, strict=True)
        for implementation in args.implementations
        if not any(fnmatch.fnmatch(f"{model}:{implementation}", what) for what in args.skip)
    ]
    started = []
    for model, batch, implementation in wanted:
        if reason := missing(model, implementation):
            print(f"left out: {implementation}, {model}: {reason}", file=sys.stderr)
        else:
            started.append(Contender(model, implementation, batch, args, compiling))
    for i, contender in enumerate(started):
        left = args.compile_limit and max(0, args.compile_limit - time.perf_counter() + start)
        name = f"{contender.implementation}, {contender.model}"
        if reason := contender.wait(left):
            print(f"left out: {name}: {reason}", file=sys.stderr)
            continue
        found.append(contender)
        seconds = f"compiled in {contender.compile_seconds:.0f} s"
        print(f"{name}: {seconds} ({i + 1} of {len(started)})", file=sys.stderr)
    return found, len(found) < len(started)


def missing(model: str, implementation: str) -> str | None:
    """Why there is no such implementation of the model, if there is none."""
    if implementation in JAX:
        new = jax_contenders.new_model(implementation, model)
    elif reason := torch_contenders.unavailable(implementation):
        return reason
    else:
        new = torch_contenders.new_network(implementation, model)
    return None if new else "it has no such model"


def measure(contenders: list[Contender], args, peak: float) -> list[dict]:
    """A row for each implementation of one model."""
    seconds = np.zeros((args.repeats, len(contenders)))
    for contender in contenders:
        contender.seconds(3)
    for turn in seconds:
        for i, contender in enumerate(contenders):
            turn[i] = contender.seconds(args.steps)
    for contender in contenders:
        contender.close()
    model, names = contenders[0].model, [contender.implementation for contender in contenders]
    flops = complexity(nnx.eval_shape(lambda: create_model(model, rngs=nnx.Rngs(0)))).flops
    ours = seconds[:, names.index(OURS)] if OURS in names else None
    return [
        {
            "model": model,
            "implementation": contender.implementation,
            "device": jax.devices()[0].device_kind,
            "batch": contender.batch,
            "optimizer": args.optimizer,
            "images_per_second": contender.batch / np.median(seconds[:, i]),
            "speed_over_its": None if ours is None else float(np.median(seconds[:, i] / ours)),
            "mfu": 6 * flops * contender.batch / np.median(seconds[:, i]) / peak,
            "peak_bytes": contender.peak_bytes,
            "compile_seconds": round(contender.compile_seconds, 1),
        }
        for i, contender in enumerate(contenders)
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

    contenders, one_failed = compiled(args)
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
            rows += measure(of_model, args, peak)
        if args.json:
            with open(args.json, "w") as file:
                json.dump([row | about for row in rows], file, indent=2)
                file.write("\n")
    print(table(rows))
    return int(one_failed)


if __name__ == "__main__":
    sys.exit(main())
