"""What some tests need."""

import importlib.util
import os

import pytest

# With CI set, where everything must be there, they fail instead.
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu") and not os.environ.get("CI"),
    reason="there is no libtpu for this machine",
)
