"""Tells where the time of a training step goes: to kernels on the device here, or on the host.

    python -m benchmarks.profile_step                             ViT_C-4GF, 256 images
    python -m benchmarks.profile_step --implementation "plain Flax, bfloat16" --batch 128
    python -m benchmarks.profile_step --host                      what the host does in that time

The step is that of benchmarks.train_step. JAX's profiler watches --steps of them; kernels whose
names differ only in a number at the end share a line. On CPUs the times of all threads are added
up. With --host the lines are what JAX, XLA and the driver report of their work and their waiting,
each without the parts that have lines of their own.
"""

import collections
import pathlib
import re
import sys
import tempfile

import jax

from benchmarks import arguments, jax_contenders
from benchmarks.workload import Case
from convstem_jax import files
from convstem_jax.models import MODELS
from convstem_jax.optim import OPTIMIZERS
from convstem_jax.terminal import positive

# XLA does without CUDA graphs when it is profiled, and the host would have other work.
_WITH_GRAPHS = (("xla_enable_command_buffers_during_profiling", "true"),)
# These last as long as the instructions that they start, each of which is counted.
_STARTS_OTHERS = ("while", "call", "conditional")


def measure(
    step: jax_contenders.JaxStep, num_steps: int, host: bool = False
) -> tuple[list[dict], float]:
    """Profiles compiled steps.

    Args:
        step: the step to profile.
        num_steps: how many of them.
        host: report what the host's threads do, in place of kernels.

    Returns:
        `name`, with `times` and `seconds` per step, the longest first; and the seconds per step
        from the first event's start to the last one's end.
    """
    step.run(2)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # watching every function would take the host most of its time
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            step.run(num_steps)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    found = [
        pair
        for plane in profile.planes
        for line in plane.lines
        for pair in (_host_events if host else _kernels)(plane.name, line)
    ]
    times, seconds = collections.Counter(), collections.Counter()
    for event, ns in found:
        name = re.sub(r"([._]\d+)+$", "", event.name)
        times[name] += 1
        seconds[name] += ns / 1e9
    rows = [
        {"name": name, "times": times[name] / num_steps, "seconds": total / num_steps}
        for name, total in seconds.most_common()
    ]
    start = min(event.start_ns for event, _ in found)
    end = max(event.start_ns + event.duration_ns for event, _ in found)
    return rows, (end - start) / 1e9 / num_steps


def _kernels(plane: str, line) -> list[tuple]:
    """Kernels of a device's or a thread's line, and how many ns each takes."""
    return [(event, event.duration_ns) for event in line.events if _is_kernel(plane, line, event)]


def _host_events(plane: str, line) -> list[tuple]:
    """What a thread of the host does, except for a CPU's kernels, and the ns that are its own."""
    events = list(line.events) if plane == "/host:CPU" else []
    return [(x, ns) for x, ns in zip(events, _own_ns(events), strict=True) if not _is_of_xla(x)]


def _own_ns(events: list) -> list[float]:
    """How long each event of one thread lasts, without the events inside it."""
    own, around = [event.duration_ns for event in events], []
    for i in sorted(range(len(events)), key=lambda i: (events[i].start_ns, -own[i])):
        event = events[i]
        while around and around[-1][1] <= event.start_ns:
            around.pop()
        if around:
            own[around[-1][0]] -= event.duration_ns
        around.append((i, event.start_ns + event.duration_ns))
    return own


def _is_kernel(plane: str, line, event) -> bool:
    if plane.startswith("/device:GPU"):
        return line.name.startswith("Stream")
    if event.name.startswith(_STARTS_OTHERS):
        return False
    if plane.startswith("/device:TPU"):
        return line.name == "XLA Ops"
    return _is_of_xla(event)


def _is_of_xla(event) -> bool:
    """Whether the event is a thread running an instruction of a program."""
    return any(name == "hlo_op" for name, _ in event.stats)


def table(rows: list[dict], num: int) -> str:
    """The first `num` rows as a Markdown table, and the others as one."""
    total, others = sum(row["seconds"] for row in rows), rows[num:]
    shown = rows[:num]
    if others:
        sums = {key: sum(row[key] for row in others) for key in ("times", "seconds")}
        shown.append({"name": f"{len(others)} others"} | sums)
    lines = [
        (
            row["name"], f"{row['times']:,.0f}", f"{1e3 * row['seconds']:.3f}",
            f"{100 * row['seconds'] / total:.1f}",
        )
        for row in shown
    ]  # fmt: skip
    headers = ("name", "times a step", "ms a step", "share (%)")
    return arguments.table(headers, lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = arguments.new_parser(
        "profile_step", __doc__, "write all lines as a list of objects too"
    )
    add = parser.add_argument
    add("--model", default="vitc_4gf", choices=MODELS, metavar="MODEL",
        help="as in convstem_jax.create_model (default: %(default)s)")  # fmt: skip
    add("--implementation", default=jax_contenders.OURS, metavar="NAME",
        choices=jax_contenders.IMPLEMENTATIONS,
        help=f"of: {'; '.join(jax_contenders.IMPLEMENTATIONS)} (default: %(default)s)")  # fmt: skip
    add("--batch", type=arguments.even, default=256, help="default: %(default)s; must be even")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="default: %(default)s")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"),
        help="of convstem_jax (default: %(default)s)")  # fmt: skip
    add("--steps", type=positive, default=3, help="default: %(default)s")
    add("--host", action="store_true", help="show what the host does instead of the kernels")
    add("--top", type=positive, default=25, metavar="N",
        help="lines of the table (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if not jax_contenders.new_model(args.implementation, args.model):
        parser.error(f"{args.implementation} has no {args.model}")
    options = _WITH_GRAPHS if args.host else ()
    case = Case(
        args.model, args.implementation, args.batch, args.optimizer,
        dtype=args.dtype, xla_options=options,
    )  # fmt: skip
    print(f"compiling for {jax.devices()[0].device_kind}", file=sys.stderr, flush=True)
    rows, seconds = measure(jax_contenders.JaxStep(case), args.steps, args.host)
    if args.json:
        about = vars(args) | {"device": jax.devices()[0].device_kind} | arguments.made_by(argv)
        files.write_json(args.json, [row | about for row in rows])
    print(table(rows, args.top))
    total = sum(row["seconds"] for row in rows)
    threads = " of all threads" if args.host or jax.default_backend() == "cpu" else ""
    what = "events" if args.host else "kernels"
    print(
        f"{1e3 * total:.2f} ms{threads} in {sum(row['times'] for row in rows):,.0f} {what}; "
        f"{1e3 * seconds:.2f} ms from the first to the last"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
