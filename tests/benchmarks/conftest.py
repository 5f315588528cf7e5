"""What the tests of benchmarks/ share."""

import multiprocessing

import pytest


@pytest.fixture
def processes_of_one(monkeypatch, request):
    """Contenders' processes are copies of one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
