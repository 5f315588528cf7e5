"""Cycles and collectives of a program, read from the text that the TPU compiler leaves."""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import math
import re

_TYPES = {"pred": 1, "s8": 1, "u8": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2, "s64": 8}
_TYPES |= {"u64": 8, "f64": 8, "s16": 2, "u16": 2}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True)
class Program:
    """What one step does on one device."""

    cycles: int  # of the compiler's cost model, without collectives
    collectives: dict[str, tuple[int, int]]  # kind -> how many, and the bytes of their results


def read_program(hlo: str) -> Program:
    """Reads a scheduled HLO module, as `compiled.as_text()` gives it.

    Loops count as often as they run, and of a conditional's branches the longest counts.

    Raises:
        ValueError: it is not one, or has a form that this function does not know.
    """
    computations, entry, name = {}, None, None
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name and line.startswith("}"):
            name = None
        elif name:
            computations[name].append(line)
    if entry is None:
        raise ValueError("the compiled program has no entry: jax or libtpu is too new")
    cycles, collectives = 0, {}
    for times, line in _executed(computations, entry):
        if match := re.search(r'"estimated_cycles":"(\d+)"', line):
            cycles += times * int(match[1])
        if match := re.search(rf"= (.*?) ({_COLLECTIVES})(-start)?\(", line):
            types, kind, start = match.groups()
            found = _sizes(types)
            if start and kind != "all-reduce":  # has its operands too, before the results
                found = found[len(found) // 2 :]
            # An asynchronous one appears in several fusions, with the work that hides it.
            channel = re.search(r"channel_id=(\d+)", line)
            collectives[channel[1] if channel else -len(collectives)] = kind, times, sum(found)
    counts, sizes = Counter(), Counter()
    for kind, times, size in collectives.values():
        counts[kind] += times
        sizes[kind] += times * size
    return Program(cycles, {kind: (counts[kind], sizes[kind]) for kind in sorted(counts)})


def _executed(computations: dict[str, list[str]], name: str) -> Iterator[tuple[int, str]]:
    """Yields the instructions of a computation with how often they run.

    A fusion counts as one instruction with cycles of its own; of what is inside only the
    collectives are yielded.
    """
    for line in computations[name]:
        yield 1, line
        if match := re.search(r"\bwhile\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
            trips = _trips(computations[match[1]])
            for times, inner in _executed(computations, match[2]):
                yield trips * times, inner
        elif match := re.search(r"\bconditional\(.*branch_computations=\{([^}]*)\}", line):
            branches = [list(_executed(computations, b.strip(" %"))) for b in match[1].split(",")]
            yield from max(branches, key=_cycles)
        elif match := re.search(r"\b(?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.-]+)", line):
            yield from _executed(computations, match[1])
        elif match := re.search(r"\bfusion\(.*calls=%?([\w.-]+)", line):
            for times, inner in _executed(computations, match[1]):
                if re.search(f" (?:{_COLLECTIVES})", inner):
                    yield times, inner.partition("backend_config")[0]


def _trips(condition: list[str]) -> int:
    """How often a loop runs that counts from 0; one that waits for some other event counts as 1."""
    text = "\n".join(condition)
    limit = re.search(r"= s32\[\]\S* constant\((\d+)\)", text)
    return int(limit[1]) if limit and "direction=LT" in text else 1


def _cycles(instructions: list[tuple[int, str]]) -> int:
    found = ((n, re.search(r'"estimated_cycles":"(\d+)"', line)) for n, line in instructions)
    return sum(n * int(match[1]) for n, match in found if match)


def _sizes(types: str) -> list[int]:
    """Bytes of each array of a type such as `(f32[24]{0}, bf16[192,576]{1,0}, u32[])`."""
    return [
        _TYPES[kind] * math.prod(int(n) for n in shape.split(","))
        for kind, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", types)
        if kind in _TYPES
    ]
