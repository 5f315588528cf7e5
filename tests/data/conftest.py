"""What the tests of convstem_jax/data share."""

import shutil

import pytest

from convstem_jax.data import sources
from tests.data.embedded import DATASETS, NAME


@pytest.fixture(scope="module")
def train_split():
    return sources.open_split(str(DATASETS), NAME, "train")


@pytest.fixture(scope="module")
def test_split():
    return sources.open_split(str(DATASETS), NAME, "test")


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded data set to damage."""
    shutil.copytree(DATASETS / NAME, tmp_path / NAME)
    return tmp_path
