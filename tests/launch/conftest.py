"""What the tests of launch/ share."""

import pytest

from tests.launch.cloud import Cloud


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)
