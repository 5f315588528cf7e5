"""A file is written whole or not at all."""

import pytest

from convstem_jax import files


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_stops_writing_leaves_the_old_file_alone(error, tmp_path):
    path = tmp_path / "a.txt"
    files.write(str(path), "old")
    with pytest.raises(error), files.replacing(str(path), "w") as file:
        file.write("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(str(path), "wb") as file:
        file.write(b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_the_nearest_name_that_is_there_is_told(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").symlink_to(tmp_path / "gone")
    assert (
        files.not_there(f"{tmp_path}/frst/")
        == f"{tmp_path}/frst/ is not there: is it {tmp_path}/first?"
    )
    for name in ("second", "other", "no/folder"):
        assert files.not_there(f"{tmp_path}/{name}") == f"{tmp_path}/{name} is not there"
