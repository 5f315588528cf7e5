"""launch/data.sh: the data of a TPU VM."""

import pytest

from tests.launch.cloud import FAKE

GB = 10**9
SIZED = ["storage du", 0, f"{150 * GB}  gs://my-bucket/data\n"]


def fill(cloud, answers, *, disk: int, memory: int, folder: str = "", **settings):
    """Runs data.sh with so many GB of disk and memory free; returns its result and what it did."""
    for name in ("sudo", "df", "free"):
        (cloud.folder / "bin" / name).symlink_to(FAKE)
    free = f"        total used free shared buff available\nMem: 9 9 9 9 9 {memory * GB}\n"
    cloud.answer([*answers, ["df", 0, f"Avail\n{disk * GB}\n"], ["free", 0, free]])
    done = cloud.run("launch/data.sh", DATA_DIR=folder or str(cloud.home), **settings)
    words = (" ".join(call) for call in cloud.calls())
    did = [w for w in words if w.startswith(("sudo mount", "gcloud storage rsync"))]
    return done, did


def test_data_go_to_the_disk_where_it_has_the_room(cloud):
    done, did = fill(cloud, [SIZED], disk=160, memory=10)
    assert done.returncode == 0, done.stderr
    assert did == [f"gcloud storage rsync --recursive gs://my-bucket/data {cloud.home}"]
    assert "150 GB of data go to" in done.stdout and "160 GB free" in done.stdout


def test_data_go_to_memory_where_the_disk_is_too_small(cloud):
    done, did = fill(cloud, [SIZED], disk=90, memory=190, MEMORY_RESERVE_GB="38")
    assert done.returncode == 0, done.stderr
    size = 150 * GB + 2**30
    assert did[0] == f"sudo mount --types tmpfs --options size={size},mode=0777 data {cloud.home}"
    assert did[1].startswith("gcloud storage rsync")


@pytest.mark.parametrize("size, memory", [(2 * 10**6, 1), (2 * 10**6 + 4000, 9)])
def test_what_is_there_already_needs_no_room(cloud, size, memory):
    """Files take whole pages, so that the copy may look larger than the bucket."""
    (cloud.home / "part").write_bytes(bytes(2 * 10**6))
    du = ["storage du", 0, f"{size}  gs://my-bucket/data\n"]
    done, did = fill(cloud, [du], disk=1, memory=memory)
    assert done.returncode == 0 and len(did) == 1, done.stderr


@pytest.mark.parametrize(
    ("answer", "memory", "folder", "status", "words"),
    [
        (SIZED, 180, "", 2, "150 GB of data"),
        # A file system in memory that already exists, and is too small.
        (SIZED, 900, "/dev/shm", 2, "what is mounted at /dev/shm"),
        (SIZED, 900, "/mnt/bucket/data", 2, "lies in the bucket"),
        (
            ["storage du", 1, "ERROR: URLs matched no objects: gs://…\n"],
            900,
            "",
            3,
            "holds nothing",
        ),
        (["storage du", 0, "0  gs://my-bucket/data\n"], 900, "", 3, "holds nothing"),
        (["storage du", 1, "ERROR: HTTPError 503\n"], 900, "", 1, "503"),
    ],
)
def test_data_that_cannot_be_copied(cloud, answer, memory, folder, status, words):
    done, did = fill(cloud, [answer], disk=90, memory=memory, folder=folder)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and did == []


def test_a_copy_that_fails_is_tried_again(cloud):
    answers = [SIZED, ["storage rsync", 1, "ERROR: connection reset\n"]]
    done, did = fill(cloud, answers, disk=160, memory=10)
    assert done.returncode == 1 and "connection reset" in done.stderr and len(did) == 1
