"""A data set in one file: the same records, and what is wrong with a file."""

import dataclasses
import errno
import os
import pickle

import pytest

from convstem_jax.data import pack, packed, sources
from convstem_jax.errors import ConfigError, DataError
from tests.data.embedded import DATASETS, NAME, same


@pytest.fixture(scope="module")
def packed_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    flags = ["--dataset", NAME, "--data_dir", str(DATASETS), "--splits", "test,train[:100]"]
    assert pack.main([*flags, "--output", str(folder)]) == 0
    return folder


def test_a_packed_file_is_the_data_set(packed_dir, test_split):
    split = sources.open_split(str(packed_dir), NAME, "test")
    assert len(split) == 2000 and split.num_classes == 10
    assert split.class_names == test_split.class_names and split.class_names[9] == "Ankle boot"
    for i in (0, 1, 1999):
        assert same(split[i], test_split[i])
    assert split.fingerprint() == test_split.fingerprint()
    records = list(split.records)
    others = [records[:-1], [*records[:-2], records[0]], [records[1], *records[1:]]]
    others += [[*records[:1000], *records[999:]], [records[0], *records[:0:-1][1:], records[-1]]]
    splits = [split, *(dataclasses.replace(split, records=other) for other in others)]
    splits += [dataclasses.replace(split, class_names=split.class_names[::-1])]
    assert len({x.fingerprint() for x in splits}) == 7
    part = sources.open_split(str(packed_dir), NAME, "test[50%:1005]")
    assert len(part) == 5 and same(part[0], test_split[1000])
    assert len(sources.open_split(str(packed_dir), NAME, "train")) == 100
    pickled = pickle.dumps(split.records)  # for each worker process
    assert len(pickled) < 0.2 * split.records.content.size
    assert pickle.loads(pickled)[1999] == split.records[1999]
    path = packed_dir / f"{NAME}.npz"
    time_ns = path.stat().st_mtime_ns
    os.utime(path, ns=(time_ns, time_ns + 1))
    with pytest.raises(DataError, match="packed again while it was in use"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    "split, message",
    [
        ("validation", "has no split 'validation': it has test, train"),
        ("test[7:7]", "'test.7:7.' cannot be read: .* has 2000 records"),
        ("test[:2001]", "'test.:2001.' cannot be read: .* has 2000 records"),
        ("test[a:]", "'test.a:.' is not a split"),
    ],
)
def test_what_a_packed_file_does_not_have(packed_dir, split, message):
    with pytest.raises(ConfigError, match=message):
        sources.open_split(str(packed_dir), NAME, split)


def test_a_damaged_packed_file(packed_dir, tmp_path, capsys):
    content = (packed_dir / f"{NAME}.npz").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 4] ^= 1
    for damaged in (content[: len(content) // 2], flipped):
        (tmp_path / f"{NAME}.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read.*pack it again"):
            sources.open_split(str(tmp_path), NAME, "test")
    assert pack.main(["--dataset", "none", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "data set 'none' is not in datasets" in error and "nor as none.npz" in error
    assert error.count("\n") == 1


def test_a_packed_file_that_may_not_be_opened_is_not_damaged(packed_dir, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(packed, "open", refuse, raising=False)
    with pytest.raises(ConfigError, match="by this process: give it more memory or open files"):
        sources.open_split(str(packed_dir), NAME, "test")
