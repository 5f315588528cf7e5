"""What the programs show on a terminal."""

import io
import itertools
import sys

import pytest

from convstem_jax.terminal import progress_bar


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_file_gets_few_progress_bars(monkeypatch, is_terminal):
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, 0.15).__next__)
    assert list(progress_bar(range(5), "photos", "image")) == list(range(5))
    assert "photos: 100%" in shown.getvalue() and "5/5" in shown.getvalue()
    assert (shown.getvalue().count("\r") > 4) is is_terminal
