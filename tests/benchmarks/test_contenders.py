"""Contenders compile side by side, each in a process of its own except on TPUs."""

import multiprocessing
import threading

import jax
import pytest

from benchmarks import contenders
from benchmarks.workload import Case


@pytest.mark.usefixtures("processes_of_one")
@pytest.mark.parametrize(("overlap", "most"), [(0, 1), (2, 4)])
def test_so_many_of_each_framework_compile_at_once(monkeypatch, overlap, most):
    busy, peak = [], 0

    class Watched(contenders.Contender):
        def __init__(self, case):
            nonlocal peak
            busy.append(case.implementation)
            peak = max(peak, len(busy))
            num_torch = sum(name in contenders.TORCH for name in busy)
            assert max(num_torch, len(busy) - num_torch) <= max(1, overlap)
            super().__init__(case)

        def compiled(self):
            super().compiled()
            busy.remove(self.case.implementation)

    monkeypatch.setattr(contenders, "_serve", quick_serve)
    monkeypatch.setattr(contenders, "Contender", Watched)
    names = [*contenders.JAX[:2], *contenders.TORCH]
    cases = [Case("vitp_tiny", name, batch=2) for name in names]
    found = contenders.all_compiled(cases, overlap, None)
    assert sorted(contender.case for contender in found) == sorted(cases)
    assert peak == most and not busy


def quick_serve(pipe, case):
    """A contender's process that is compiled at once."""
    pipe.send((0.1, 0))


@pytest.mark.usefixtures("shallow")
def test_on_tpus_contenders_share_the_process(monkeypatch):
    """Only one process can open a TPU. Here the threads are tested, on whatever device there is."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "and JAX runs on tpu" in contenders.missing("vitp_tiny", "torchvision")
    cases = [Case("vitp_tiny", name, 2, dtype="float32") for name in contenders.JAX[::2]]
    failed = Case("vitp_tiny", "convstem_jax", 2, xla_options=(("xla_unheard_of", "1"),))
    left_out, before = [], threading.active_count()
    cached = jax.config.jax_enable_compilation_cache
    try:
        found = contenders.all_compiled([*cases, failed], 0, lambda *x: left_out.append(x))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    assert [x.case for x in found] == cases and threading.active_count() == before + 2
    assert left_out[0][0] == failed and "xla_unheard_of" in str(left_out[0][1])
    assert all(x.seconds(2) > 0 for x in found) and not multiprocessing.active_children()
    for contender in found:
        contender.end()
    assert threading.active_count() == before
