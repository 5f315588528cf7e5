"""launch/worker.sh, a TPU VM's own script: this one runs for real."""

import os
from pathlib import Path
import re
import subprocess
import time

import pytest

from tests.launch.cloud import FAKE, LAUNCH, Cloud


class Worker:
    def __init__(self, folder: Path):
        self.cloud, self.folder = Cloud(folder), folder
        (folder / "bin/sleep").unlink()
        self.workdir = folder / "workdir"

    def __call__(self, arguments: str) -> str:
        done = self.cloud.run(f"{LAUNCH}/worker.sh {arguments}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait(self, state: str, seconds: float = 20) -> str:
        """Waits until its state is no longer this one; returns the new one."""
        deadline = time.monotonic() + seconds
        while True:
            name, host, now, step = self(f"state {self.workdir}").split()
            assert (name, host) == ("worker", "host-0") and re.fullmatch(r"-1|\d+", step)
            if now != state or time.monotonic() > deadline:
                return now
            time.sleep(0.05)


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


@pytest.mark.parametrize("status", [0, 2])
def test_worker_sets_up_again_where_a_program_fails(worker, status):
    """uv's own 2 for want of a network must not be taken for a wrong setting."""
    uv = worker.cloud.home / ".local/bin/uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(f"#!/bin/bash\nexit {status}\n")
    uv.chmod(0o755)
    (worker.cloud.folder / "bin/python3").symlink_to(FAKE)
    nothing = {"BUCKET": "", "DATA_SOURCE": "", "WORKDIR": "/tmp"}
    done = worker.cloud.run(f"{LAUNCH}/worker.sh setup", **nothing)
    assert done.returncode == min(status, 1), done.stderr


def set_up(worker, answers, *more: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Runs set-up where these programs exist too; returns its result and what root did."""
    names = ("sudo", "stat", "mountpoint", "sleep", "python3", ".local/bin/uv")
    (worker.cloud.home / ".local/bin").mkdir(parents=True)
    for name in (*names, *more):
        folder = worker.cloud.folder / "bin" if "/" not in name else worker.cloud.home
        (folder / name).symlink_to(FAKE)
    worker.cloud.answer(answers)
    done = worker.cloud.run(f"{LAUNCH}/worker.sh setup", DATA_SOURCE="")
    calls = [" ".join(call[1:]) for call in worker.cloud.calls() if call[0] == "sudo"]
    return done, [re.sub(" .* ", " … ", call) for call in calls]


MOUNTED = ["stat", 0, "  File: /mnt/bucket\n"]
NOT_MOUNTED = ["mountpoint", 1, ""]
MOUNT = ["mkdir … /mnt/bucket", "systemd-run … /mnt/bucket"]


@pytest.mark.parametrize(
    ("answers", "did"),
    [
        ([MOUNTED], []),
        ([MOUNTED, NOT_MOUNTED], MOUNT),
        ([["stat", 1, "stat: '/mnt/bucket': No such file or directory\n"], NOT_MOUNTED], MOUNT),
        (
            [["stat", 1, "stat: '/mnt/bucket': Transport endpoint is not connected\n"]],
            ["umount … /mnt/bucket", *MOUNT],
        ),
        ([["stat", 0, ""]], ["umount … /mnt/bucket", *MOUNT]),
    ],
)
def test_worker_mounts_the_bucket(worker, answers, did):
    done, calls = set_up(worker, answers, "gcsfuse")
    assert done.returncode == 0 and calls == did, done.stderr


def test_worker_waits_for_a_machine_that_updates_itself(worker):
    locked = ["sudo apt-get update", 100, "E: Could not get lock\n"]
    answers = [MOUNTED, NOT_MOUNTED, locked, locked, ["sudo apt-get update", 0, ""]]
    done, calls = set_up(worker, answers)
    assert done.returncode == 0, done.stderr
    assert calls[-6:] == ["apt-get … update"] * 3 + ["apt-get … gcsfuse", *MOUNT]
    assert worker.cloud.calls().count(["sleep", "10"]) == 2


def test_worker_tells_why_the_bucket_cannot_be_mounted(worker):
    answers = [["sudo systemd-run", 5, "Job failed\n"], ["sudo journalctl", 0, "no such bucket\n"]]
    done, _ = set_up(worker, [MOUNTED, NOT_MOUNTED, *answers], "gcsfuse")
    assert done.returncode == 1 and "no such bucket" in done.stderr


def test_worker_does_not_wait_for_a_bucket_that_hangs(worker):
    """Processes that wait for it cannot be ended."""
    find = worker.cloud.folder / "bin/find"
    find.write_text("#!/bin/bash\ntrap '' TERM\nexec sleep 15\n")
    find.chmod(0o755)
    start = time.monotonic()
    done = worker.cloud.run(f"{LAUNCH}/worker.sh state {worker.workdir}", ANSWER_SECONDS="1")
    assert done.stdout == "worker host-0 none -1\n"
    assert time.monotonic() - start < 10


def test_worker_does_not_train_beside_the_bucket(worker):
    done = worker.cloud.run(f"{LAUNCH}/worker.sh start train --workdir /mnt/bucket/runs/first")
    assert done.returncode == 1 and "/mnt/bucket is not mounted" in done.stderr
    assert worker(f"state {worker.workdir}") == "worker host-0 none -1\n"


def test_worker_starts_and_tells_the_exit_status(worker):
    assert worker(f"state {worker.workdir}") == "worker host-0 none -1\n"
    for finished in ("90", "100", "100/state", "110/state", "old200"):  # 110 is being saved
        (worker.workdir / "checkpoints" / finished).mkdir(parents=True)
        (worker.workdir / "checkpoints" / finished / "commit_success.txt").touch()
    # A process that it leaves behind holds nothing up.
    go = worker.folder / "go"
    job = f"sleep 9 & echo told; until [[ -e {go} ]]; do sleep 0.05; done; exit 5"
    assert worker(f"start bash -c '{job}'") == "started\n"
    assert worker(f"state {worker.workdir}") == "worker host-0 running 100\n"
    go.touch()
    assert worker.wait("running", seconds=5) == "5"
    assert worker("log") == "told\n"


def test_worker_saves_at_a_shutdown(worker):
    """systemd sends SIGHUP after SIGTERM to the processes of a session."""
    worker("""start bash -c "trap 'echo saved; exit 75' TERM; kill -HUP $$; kill $$" """)
    assert worker.wait("running") == "75"
    assert worker("log") == "saved\n"


def test_worker_starts_once(worker):
    ready = worker.folder / "ready"
    worker(f"""start bash -c "trap 'echo saved; exit 75' TERM; touch {ready}
        while true; do sleep 0.05; done" """)
    assert worker("start echo never") == "already running\n"
    while not ready.exists():
        time.sleep(0.02)
    since = time.monotonic()
    assert worker("--dry-run stop").startswith("kill ") and time.monotonic() < since + 30
    assert worker(f"state {worker.workdir}").split()[2] == "running"
    worker("stop")
    assert worker.wait("running") == "75"
    assert worker("log") == "saved\n"
    assert worker("start true") == "started\n"
    assert worker.wait("running") == "0"


def test_worker_tells_of_a_lost_process(worker):
    worker("start true")
    assert worker.wait("running") == "0"
    pid_file = worker.cloud.home / "run/pid"
    pid_file.unlink()
    worker("start sleep 60")
    deadline = time.monotonic() + 10
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    os.killpg(os.getpgid(pid), 9)  # with the shell that waits for it: as if the machine stopped
    assert worker.wait("running") == "lost"
