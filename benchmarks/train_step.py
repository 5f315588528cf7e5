"""Times whole training steps of this project and of its peers, in one run.

    python -m benchmarks.train_step               ViT_C-4GF, or on a CPU ViT_C-tiny in float32
    python benchmarks/train_step.py               the same
    python -m benchmarks.train_step --models vitc_1gf vitc_18gf --batch 512 --json results.json
    python -m benchmarks.train_step --xla_options xla_gpu_graph_min_graph_size=5

A step is what training does: normalisation of uint8 images, lighting, mixing, forward, backward,
optimiser, EMA; the batch waits on the device. Each implementation has a process of its own. When
all those of a model, or of --together models, are compiled, they take turns --repeats times;
medians are printed, also of ratios. What is not installed is named and left out. MFU counts the
operations of the paper's network, as a share of what this device reaches with products of large
matrices of that type, measured in the same run.
"""

import argparse
from collections import deque
from collections.abc import Callable
import fnmatch
import os
import pathlib
import platform
import sys

if not __package__:  # started as a file
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from flax import nnx
import jax
import numpy as np

from benchmarks import arguments, ceilings, torch_contenders
from benchmarks.contenders import JAX, TORCH, Contender, all_compiled, missing
from benchmarks.jax_contenders import OURS
from benchmarks.workload import Case
from convstem_jax import files
from convstem_jax.complexity import complexity
from convstem_jax.models import MODELS, create_model
from convstem_jax.optim import OPTIMIZERS
from convstem_jax.terminal import positive, progress_bar


def take_turns(
    contenders: list[Contender], steps: int, repeats: int, leave_out: Callable
) -> dict[Contender, list[float]]:
    """Seconds per step in each turn, of those contenders that do not fail.

    Args:
        contenders: compiled ones.
        steps: in a turn.
        repeats: how many turns each has; each round begins with another contender.
        leave_out: called with the case of each that fails, and the reason.
    """
    seconds, order = {contender: [] for contender in contenders}, deque(contenders)
    for _ in progress_bar(range(repeats), "taking turns", "round"):
        for contender in [x for x in order if x in seconds]:
            try:
                seconds[contender].append(contender.seconds(steps))
            except RuntimeError as error:
                del seconds[contender]
                leave_out(contender.case, error)
        order.rotate(-1)
    return seconds


def rows_of(model: str, seconds: dict[Contender, list[float]], peak: float) -> list[dict]:
    """A row for each implementation of one model.

    Args:
        model: its name.
        seconds: of its contenders, from `take_turns`.
        peak: operations a second that the device reaches.
    """
    network = nnx.eval_shape(lambda: create_model(model, rngs=nnx.Rngs(0)))
    flops = 6 * complexity(network).flops  # of the paper's network, forward and twice backward
    ours = next((its for contender, its in seconds.items() if contender.case.name == OURS), None)
    rows = []
    for contender, its in seconds.items():
        case = contender.case
        images_per_second = case.batch / np.median(its)
        rows.append({
            "model": case.model,
            "implementation": case.name,
            "device": jax.devices()[0].device_kind,
            "batch": case.batch,
            "optimizer": case.optimizer,
            "images_per_second": images_per_second,
            "speed_over_its": float(np.median(np.divide(its, ours))) if ours else None,
            "mfu": flops * images_per_second / peak,  # whatever an implementation omits
            "peak_bytes": contender.peak_bytes,
            "compile_seconds": round(contender.compile_seconds, 1),
        })  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
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
    return arguments.table(headers, lines, num_text=2)


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases to time; what is not installed is named and left out."""
    variants = [(name, (), 1) for name in args.implementations]
    variants += [(OURS, options, 1) for options in args.xla_options]
    if args.steps_in_a_call > 1:
        variants.append((OURS, (), args.steps_in_a_call))
    cases = []
    for model, batch in zip(args.models, args.batch, strict=True):
        for name, *more in variants:
            case = Case(model, name, batch, args.optimizer, args.torch_mode, args.dtype, *more)
            if any(fnmatch.fnmatch(f"{model}:{case.name}", pattern) for pattern in args.skip):
                continue
            if reason := missing(model, name):
                print(f"left out: {case}: {reason}", file=sys.stderr)
            else:
                cases.append(case)
    return cases


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser("train_step", __doc__)
    add = parser.add_argument
    on_cpu = jax.default_backend() == "cpu"
    add("--models", nargs="+", choices=MODELS, metavar="MODEL",
        default=["vitc_tiny" if on_cpu else "vitc_4gf"],
        help="as in convstem_jax.create_model (default here: %(default)s)")  # fmt: skip
    add("--implementations", nargs="+", default=[*JAX, *TORCH], choices=[*JAX, *TORCH],
        metavar="NAME", help=f"of: {'; '.join([*JAX, *TORCH])} (default: all)")  # fmt: skip
    add("--skip", nargs="+", default=[], metavar="MODEL:NAME",
        help="leave out some of these, by patterns such as 'vitp_*:*float32'")  # fmt: skip
    add("--xla_options", nargs="+", default=[], type=_xla_options, metavar="NAME=VALUE",
        help="each adds an implementation: this project's, compiled with that option of XLA, or "
        "with several, separated by spaces within quotes")  # fmt: skip
    add("--steps_in_a_call", type=positive, default=1, metavar="N",
        help="adds an implementation: this project's, whose program makes N steps in a loop "
        "(default: %(default)s, which adds none)")  # fmt: skip
    add("--batch", type=arguments.even, nargs="+", default=[64 if on_cpu else 256],
        help="for all models, or for each; must be even (default here: %(default)s)")  # fmt: skip
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="default: %(default)s")
    add("--dtype", default="float32" if on_cpu else "bfloat16", choices=("bfloat16", "float32"),
        help="for convstem_jax, PyTorch and the products that MFU compares with; XLA is mostly "
        "faster on CPUs with float32 (default here: %(default)s)")  # fmt: skip
    add("--steps", type=positive, default=20, help="in each turn (default: %(default)s)")
    add("--repeats", type=positive, default=5, help="default: %(default)s")
    add("--torch_mode", default="default" if on_cpu else "max-autotune",
        help="of torch.compile, or eager (default here: %(default)s)")  # fmt: skip
    add("--overlap", type=positive, default=0, metavar="N", help="compile N of JAX's at once, and "
        "N of PyTorch's at the same time, which is faster but disturbs what they measure of their "
        "kernels (default: one at a time)")  # fmt: skip
    add("--together", type=positive, default=1, metavar="N",
        help="compile N models, then let all of them take turns; the device's memory must hold "
        "them (default: %(default)s)")  # fmt: skip
    add("--matmul_size", type=positive, metavar="N",
        help="size of the matrices for the peak (default: 8192, on CPUs 1024)")  # fmt: skip
    args = parser.parse_args(argv)
    if len(args.batch) == 1:
        args.batch *= len(args.models)
    if len(args.batch) != len(args.models):
        parser.error(f"--batch has {len(args.batch)} sizes for {len(args.models)} models")
    if len(set(args.models)) < len(args.models):
        parser.error("--models names one twice")
    for pattern in args.skip:
        if ":" not in pattern:
            parser.error(f"--skip {pattern} is not MODEL:NAME, such as '{pattern}:timm'")
    if args.steps % args.steps_in_a_call:
        parser.error(f"--steps {args.steps} is no multiple of {args.steps_in_a_call} in a call")
    failed = []

    def leave_out(case, reason):
        text = f"left out: {case}: {reason}"
        if "out of memory" in text or "RESOURCE_EXHAUSTED" in text:
            text += " (all that take turns share it: lower --batch or --together, or name fewer)"
        print(text, file=sys.stderr)
        failed.append(case)

    cases = cases_of(args)
    if not cases:
        parser.error("nothing is left to be timed: see --models, --implementations and --skip")
    args.matmul_size = args.matmul_size or ceilings.matmul_size()
    if on_cpu and os.getloadavg()[0] > os.cpu_count() / 2:
        print(
            f"other programs use these {os.cpu_count()} cores (load {os.getloadavg()[0]:.1f}): the "
            "ratios will be wrong, since PyTorch's threads, which wait for each other, lose most",
            file=sys.stderr,
        )
    print("measuring what products of matrices reach", file=sys.stderr)
    peak = ceilings.matmul_flops(args.matmul_size, args.dtype)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"Python {platform.python_version()}: {peak / 1e12:.2f} Tflop/s in products of "
        f"{args.matmul_size} x {args.matmul_size} matrices of {args.dtype}",
        file=sys.stderr,
    )
    about = arguments.made_by(argv) | {
        "matmul_flops": peak, "steps": args.steps, "repeats": args.repeats,
        "torch_mode": args.torch_mode, "dtype": args.dtype,
    }  # fmt: skip
    about["versions"] |= torch_contenders.versions()
    rows = []
    for first in range(0, len(args.models), args.together):
        models = args.models[first : first + args.together]
        now = [case for case in cases if case.model in models]
        contenders = all_compiled(now, args.overlap, leave_out)
        contenders.sort(key=lambda contender: cases.index(contender.case))
        seconds = take_turns(contenders, args.steps, args.repeats, leave_out)
        for model in models:
            own = {x: its for x, its in seconds.items() if x.case.model == model}
            rows += rows_of(model, own, peak)
        for contender in contenders:
            contender.end()
        if args.json:
            files.write_json(args.json, [row | about for row in rows])
    print(table(rows))
    return 1 if failed else 0


def _xla_options(text: str) -> tuple[tuple[str, str], ...]:
    options = tuple(tuple(option.split("=", 1)) for option in text.split())
    if not options or any(len(option) < 2 for option in options):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return options


if __name__ == "__main__":
    sys.exit(main())
