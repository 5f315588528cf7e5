"""What the programs show on a terminal."""

import io
import itertools
import os
import sys

import pytest

from convstem_jax.terminal import outlive_readers, progress_bar


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_file_gets_few_progress_bars(monkeypatch, is_terminal):
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, 0.15).__next__)
    assert list(progress_bar(range(5), "photos", "image")) == list(range(5))
    assert "photos: 100%" in shown.getvalue() and "5/5" in shown.getvalue()
    assert (shown.getvalue().count("\r") > 4) is is_terminal


def test_a_program_outlives_who_reads_its_output(monkeypatch):
    """Such as tee, which Ctrl-C ends too; another write, or Python's last, must not fail either."""
    reading, writing = os.pipe()
    stream = open(writing, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)  # closed when the program began
    with outlive_readers():
        print("heard", flush=True)
        assert os.read(reading, 100) == b"heard\n"
        os.close(reading)
        for _ in range(2):
            print("unheard", flush=True)
            print("unheard", file=sys.stderr)
        print("not flushed")
    assert sys.stdout is stream
    stream.close()
    sys.stderr.close()
