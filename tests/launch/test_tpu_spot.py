"""launch/tpu_spot.sh and tpu_vm.sh, where gcloud gives made-up answers."""

from pathlib import Path
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch.cloud import FAKE

CREATE, DELETE = "queued-resources create", "queued-resources delete"
DESCRIBE, NODE = "queued-resources describe", "tpu-vm describe"
STATE, SETUP, START = "worker.sh state", "worker.sh setup", "worker.sh start"
NOT_FOUND = [DESCRIBE, 1, "ERROR: NOT_FOUND: no such resource\n"]
ACTIVE = [DESCRIBE, 0, "ACTIVE\n"]
READY = [NODE, 0, "READY\t2\n"]


def workers(*states: str, step: int = -1) -> list:
    lines = [f"worker host-{i} {state} {step}\n" for i, state in enumerate(states)]
    return [STATE, 0, "".join(lines)]


def spot(cloud, answers: list, **settings):
    """Runs tpu_spot.sh; returns its result, what it did besides checking, and its waits."""
    cloud.answer(answers)
    (cloud.folder / "bin/git").symlink_to(FAKE)
    done = cloud.run("launch/tpu_spot.sh", **{"MAX_FAILURES": "4", **settings})
    did, waits = [], []
    for call in cloud.calls():
        text = " ".join(call)
        if call[0] == "sleep":
            waits.append(int(call[1]))
        for name, words in {
            "create": CREATE,
            "delete": DELETE,
            "setup": SETUP,
            "start": START,
            "stop": "worker.sh stop",
            "log": "worker.sh log",
        }.items():
            if words in text:
                did.append(name)
    return done, did, waits


def test_spot_done(cloud):
    states = [workers("none", "none"), workers("running", "running"), workers("0", "running")]
    queue = [NOT_FOUND, [DESCRIBE, 0, "WAITING_FOR_RESOURCES\n"], [DESCRIBE, 0, "PROVISIONING\n"]]
    answers = [*queue, ACTIVE, READY, *states, workers("0", "0")]
    done, did, waits = spot(cloud, answers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == ["create", "setup", "start", "delete"]
    assert set(waits) == {60}
    assert "the run is done" in done.stdout
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", s) for s in done.stdout.splitlines())


def test_spot_waits_longer_after_each_refusal(cloud):
    answers = [NOT_FOUND, [CREATE, 1, "ERROR: RESOURCE_EXHAUSTED: quota\n"]]
    done, did, waits = spot(cloud, answers, MAX_FAILURES="7", BACKOFF_MAX_SECONDS="500")
    assert done.returncode == 75
    assert did == ["create"] * 7 and waits == [60, 120, 240, 480, 500, 500]
    assert "giving up after 7 failures" in done.stdout and "no machine is left" in done.stdout


def test_spot_goes_on_after_a_refusal_and_after_a_failed_request(cloud):
    answers = [
        [CREATE, 1, "ERROR: RESOURCE_EXHAUSTED: quota\n"], [CREATE, 0, ""],
        NOT_FOUND, NOT_FOUND, [DESCRIBE, 0, "FAILED\n"], NOT_FOUND, ACTIVE, READY,
        workers("none", "none"), workers("0", "0"),
    ]  # fmt: skip
    done, did, waits = spot(cloud, answers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == ["create", "create", "delete", "create", "setup", "start", "delete"]
    assert waits == [60, 60, 120, 60, 60]


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (["git cat-file", 1, ""], 2, "has no COMMIT=0123456789abcdef"),
        (["storage ls", 1, "ERROR: One or more URLs matched no objects.\n"], 3, "holds nothing"),
        (["storage ls", 1, "ERROR: gs://my-bucket not found: 404.\n"], 3, "holds nothing"),
        (["storage ls", 1, "ERROR: 403: does not have permission\n"], 0, "the run is done"),
        (["git clone", 128, "fatal: Could not resolve host\n"], 75, "Could not resolve host"),
    ],
)
def test_spot_looks_for_code_and_data_before_it_asks_for_machines(cloud, answer, status, words):
    to_the_end = [ACTIVE, READY, workers("0", "0")]
    done, did, _ = spot(cloud, [answer, NOT_FOUND, *(to_the_end if status == 0 else [])])
    assert done.returncode == status and words in done.stdout + done.stderr, done.stdout
    assert ("create" in did) == (status == 0)


def test_create_takes_commits_that_the_repository_has(cloud, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    missing = "f" * len(commit)
    for name, status in ((commit, 0), (commit[:7], 0), (missing, 2), (missing[:7], 2)):
        done = cloud.run("launch/tpu_vm.sh create", REPOSITORY=str(tmp_path), COMMIT=name)
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("taken", [[DESCRIBE, 0, "SUSPENDED\n"], [NODE, 0, "PREEMPTED\t2\n"]])
def test_spot_goes_on_after_a_preemption(cloud, taken):
    describe = [NOT_FOUND, ACTIVE, ACTIVE, taken if taken[0] == DESCRIBE else ACTIVE, NOT_FOUND]
    node = [READY, READY, taken] if taken[0] == NODE else []
    states = [workers("none", "none"), workers("running", "running", step=5)]
    answers = [*describe, ACTIVE, *node, READY, *states, workers("none", "none"), workers("0", "0")]
    done, did, _ = spot(cloud, answers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == ["create", "setup", "start", "delete", "create", "setup", "start", "delete"]
    for words in (START, SETUP, CREATE):
        first, second = [call for call in cloud.calls() if words in " ".join(call)]
        assert first == second


def test_spot_survives_a_dropped_connection(cloud):
    dropped = [STATE, 255, "ERROR: ssh: connection closed\n"]
    half = [STATE, 0, "worker host-0 0 -1\n"]  # of two: the other's line is missing
    answers = [
        ACTIVE, READY, [SETUP, 255, "connection closed\n"], [SETUP, 0, ""],
        workers("none", "none"), workers("none", "none"), workers("running", "running"),
        dropped, half, workers("running", "running"), workers("0", "0"),
    ]  # fmt: skip
    done, did, _ = spot(cloud, answers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == ["setup", "setup", "start", "delete"]
    assert done.stdout.count("no answer") == 2


SILENT, SOME = [STATE, 255, "ssh: no route\n"], workers("running")  # of two


@pytest.mark.parametrize(("answer", "num"), [(SILENT, 30), (SOME, 5)])
def test_spot_replaces_a_silent_machine(cloud, answer, num):
    """Later if all its workers are silent: it may be ssh from here that fails."""
    answers = [
        *[ACTIVE] * num, NOT_FOUND, ACTIVE, READY,
        *[answer] * num, workers("none", "none"), workers("0", "0"),
    ]  # fmt: skip
    done, did, _ = spot(cloud, answers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == ["delete", "create", "setup", "start", "delete"]


def test_spot_without_gcloud_only_prints(cloud):
    folder = cloud.folder / "bin"
    (folder / "gcloud").unlink()
    for name in ("env", "bash", "dirname", "git"):
        (folder / name).symlink_to(shutil.which(name))
    done = cloud.run("launch/tpu_spot.sh", PATH=str(folder))
    assert done.returncode == 2 and "gcloud is not installed here" in done.stderr
    assert cloud.run("launch/tpu_spot.sh --dry-run", PATH=str(folder)).returncode == 0


def test_spot_counts_the_silence_of_each_machine(cloud):
    gone = [NODE, 0, "PREEMPTED\t2\n"]
    answers = [
        *[ACTIVE] * 5, NOT_FOUND, ACTIVE, *[READY] * 4, gone, READY, *[SOME] * 5, workers("0", "0"),
    ]  # fmt: skip
    done, did, _ = spot(cloud, answers)
    assert done.returncode == 0 and did == ["delete", "create", "delete"], done.stdout


def test_spot_ends_where_google_refuses_to_tell(cloud):
    done, did, _ = spot(cloud, [[DESCRIBE, 1, "ERROR: PERMISSION_DENIED\n"]])
    assert done.returncode == 2 and did == [] and "is unknown" in done.stdout


def test_a_run_keeps_its_settings(cloud):
    """Those it began with, whatever is committed or edited while it is watched."""
    script = '. launch/shared.sh; bash -c "echo \\$COMMIT \\$RUN_NAME"'
    done = cloud.run(shlex.join(["env", "-u", "COMMIT", "-u", "RUN_NAME", "bash", "-c", script]))
    commit, name = done.stdout.split()
    assert len(commit) == 40 and name == "convstem"


@pytest.mark.parametrize("words", [DESCRIBE, NODE])
def test_spot_deletes_nothing_while_google_does_not_answer(cloud, words):
    """Nor does it repeat itself every minute."""
    silent = [[words, 1, "ERROR: Reauthentication failed\n"]] * 40
    answers = [*silent, ACTIVE, READY, workers("running", "running"), workers("0", "0")]
    done, did, waits = spot(cloud, answers)
    assert done.returncode == 0 and did == ["delete"] and waits == [60] * 41
    assert done.stdout.count("no answer about first") == 1
    assert done.stderr.count("Reauthentication failed") == 1


def test_spot_says_that_it_does_not_know_what_is_left(cloud):
    lost = "ERROR: Failed to establish a new connection\n"
    answers = [NOT_FOUND, *([words, 1, lost] for words in (DESCRIBE, CREATE, DELETE))]
    done, did, _ = spot(cloud, answers, MAX_FAILURES="1")
    assert done.returncode == 10 and did == ["create"] + ["delete"] * 10
    assert "is unknown: launch/tpu_vm.sh status" in done.stdout and "is left" not in done.stdout


def test_spot_ends_a_command_that_hangs(cloud):
    (cloud.folder / "bin/timeout").symlink_to(FAKE)
    status, there = "tpu_vm.sh status", "machine ACTIVE\nnode READY 1\nworker host-0 "
    answers = [
        [status, 0, there + "none -1\n"], [status, 124, ""], [status, 0, there + "0 -1\n"],
    ]  # fmt: skip
    done, _, _ = spot(cloud, answers)
    assert done.returncode == 0 and "no answer" in done.stdout
    limits = {(Path(w[3]).name, w[4]): int(w[2]) for w in cloud.calls() if w[0] == "timeout"}
    assert limits.pop(("tpu_vm.sh", "status")) == 300
    assert limits == {("tpu_vm.sh", name): 3600 for name in ("setup", "run", "delete")}


@pytest.mark.parametrize("node", ["REPAIRING", "UNKNOWN", None])
def test_spot_replaces_a_machine_that_does_not_become_ready(cloud, node):
    there = [NODE, 0, f"{node}\t2\n"] if node else [NODE, 1, "ERROR: NOT_FOUND\n"]
    answers = [*[ACTIVE] * 30, NOT_FOUND, ACTIVE, *[there] * 30, READY, workers("0", "0")]
    done, did, waits = spot(cloud, answers)
    assert done.returncode == 0 and did == ["delete", "create", "delete"]
    assert f"first is ACTIVE {node or 'NONE'}" in done.stdout and waits == [60] * 31


@pytest.mark.parametrize(
    ("before", "words", "did"),
    [
        ([ACTIVE, READY], STATE, ["log"]),
        ([NOT_FOUND, ACTIVE, READY], STATE, ["create", "log", "delete"]),
        ([NOT_FOUND, ACTIVE, READY, workers("running", "running")], STATE, ["create", "log"]),
        ([], DESCRIBE, []),
        ([ACTIVE], NODE, []),
    ],
)
def test_spot_ends_where_gcloud_refuses_the_command(cloud, before, words, did):
    """Only machines that it requested itself and never reached cannot have a healthy run."""
    refused = [words, 2, "ERROR: unrecognized arguments: --flag\n"]
    done, what, _ = spot(cloud, [*before, refused])
    assert done.returncode == 2 and "SSH_FLAGS" in done.stdout and what == did
    assert "unrecognized arguments: --flag" in done.stderr and "waiting" not in done.stdout


def test_spot_leaves_the_run_of_another_user(cloud):
    done, did, _ = spot(cloud, [ACTIVE, READY, workers("others", "others")])
    assert done.returncode == 2 and did == ["log"]
    assert "another user" in done.stdout and "first is still there" in done.stdout


@pytest.mark.parametrize("mounted", [True, False])
def test_status_tells_the_run_of_another_user(cloud, mounted):
    (cloud.folder / "bin/grep").symlink_to(FAKE)
    cloud.answer([ACTIVE, READY, ["grep", int(not mounted), ""]])
    cloud.run("launch/tpu_vm.sh status")
    command = cloud.calls()[-1][-1].removeprefix("--command=")
    done = cloud.run(shlex.join(["bash", "-c", command]), cwd=cloud.home)
    assert done.stdout == f"worker host-0 {'others' if mounted else 'none'} -1\n"
    assert cloud.calls()[-1] == ["grep", "-q", " /mnt/bucket ", "/proc/mounts"]


@pytest.mark.parametrize(
    "flags, words", [("--tunnel-through-iap", "alpha compute"), ("", "compute")]
)
def test_a_tunnel_needs_an_alpha_command(cloud, flags, words):
    cloud.run("launch/tpu_vm.sh stop", SSH_FLAGS=flags)
    [call] = cloud.calls()
    assert " ".join(call).startswith(f"gcloud {words} tpus tpu-vm ssh first ")


@pytest.mark.parametrize("status", [2, 3, 4, 5, 1])
def test_spot_stops_where_a_person_must_act(cloud, status):
    answers = [ACTIVE, READY, workers("none", "none"), workers("75", str(status))]
    done, did, _ = spot(cloud, answers)
    assert done.returncode == status
    assert did == ["setup", "start", "log", "delete"]


def test_spot_stops_where_set_up_finds_damaged_data(cloud):
    done, did, _ = spot(cloud, [ACTIVE, READY, workers("none", "none"), [SETUP, 3, "error\n"]])
    assert done.returncode == 3 and did == ["setup", "log", "delete"]


def test_spot_does_not_pay_for_a_set_up_that_never_works(cloud):
    answers = [ACTIVE, READY, workers("none", "none"), [SETUP, 1, "no such package\n"]]
    done, did, _ = spot(cloud, answers, MAX_FAILURES="20")
    assert done.returncode == 1 and "set-up failed 5 times" in done.stdout
    assert did == ["setup"] * 5 + ["log", "delete"]


def test_spot_shows_the_logs_of_all_before_it_deletes_them(cloud):
    spot(cloud, [ACTIVE, READY, workers("3", "2")])
    [log] = [" ".join(call) for call in cloud.calls() if "worker.sh log" in " ".join(call)]
    assert "--worker=all" in log


def test_spot_runs_again_after_75(cloud):
    states = [workers("running", "running"), workers("75", "137"), workers("0", "0")]
    done, did, _ = spot(cloud, [ACTIVE, READY, *states])
    assert done.returncode == 0 and did == ["setup", "start", "delete"]


def test_spot_says_that_no_checkpoint_comes(cloud):
    states = [workers("running", "running", step=5)] * 125 + [workers("0", "0", step=5)]
    done, did, _ = spot(cloud, [ACTIVE, READY, *states])
    assert done.returncode == 0 and did == ["delete"]
    assert done.stdout.count("no new checkpoint in 60 checks") == 1
    assert done.stdout.count("no new checkpoint in 120 checks") == 1


def test_spot_stops_workers_that_wait_for_a_lost_one(cloud):
    states = [workers("lost", "running")] * 5 + [workers("lost", "75"), workers("0", "0")]
    done, did, _ = spot(cloud, [ACTIVE, READY, *states])
    assert done.returncode == 0, done.stdout + done.stderr
    assert did == ["stop", "setup", "start", "delete"]


def test_spot_gives_up_and_counts_anew_after_a_checkpoint(cloud):
    lost = [workers("75", "75", step=5)] * 3
    states = [*lost, workers("running", "running", step=6), workers("75", "75", step=6)]
    done, did, waits = spot(cloud, [ACTIVE, READY, *states])
    assert done.returncode == 75
    # Three failures, a checkpoint, then three more and the fourth.
    assert waits == [60, 120, 240, 60, 60, 120, 240]
    assert "checkpoint of step 6" in done.stdout
    replaced = [*["setup", "start"] * 2, "log", "delete"]
    assert did == replaced * 2 + ["log", "delete"] * 2


def test_spot_replaces_machines_on_which_the_run_keeps_failing(cloud):
    answers = [
        ACTIVE, ACTIVE, ACTIVE, NOT_FOUND, ACTIVE, READY,
        *[workers("75", "75", step=5)] * 4, workers("0", "0", step=5),
    ]  # fmt: skip
    done, did, _ = spot(cloud, answers, MAX_FAILURES="20")
    assert done.returncode == 0 and "interrupted 3 times on the same machines" in done.stdout
    again = ["setup", "start"]
    assert did == [*again, *again, "log", "delete", "create", *again, "delete"]


def test_spot_keeps_the_machine_when_told(cloud):
    done, did, _ = spot(cloud, [ACTIVE, READY, workers("0", "0")], DELETE_AT_END="no")
    assert done.returncode == 0 and did == []
    assert "launch/tpu_vm.sh delete" in done.stdout


def test_spot_says_when_it_cannot_delete(cloud):
    cannot = [DELETE, 1, "PERMISSION_DENIED\n"]
    done, did, waits = spot(cloud, [ACTIVE, READY, workers("0", "0"), cannot])
    assert done.returncode == 10 and "could NOT be deleted" in done.stdout
    assert did == ["delete"] * 10 and waits == [30] * 10
    assert "first is still there and costs money" in done.stdout


@pytest.mark.parametrize("after", [ACTIVE, NOT_FOUND])
def test_spot_tries_again_to_delete(cloud, after):
    """If only the answer was lost, the machine may be gone."""
    answers = [ACTIVE, after, READY, workers("0", "0"), [DELETE, 1, "reset\n"], [DELETE, 0, ""]]
    done, did, waits = spot(cloud, answers)
    assert done.returncode == 0 and "no machine is left" in done.stdout
    assert did == ["delete"] * (1 + (after == ACTIVE)) and waits == [30]


def test_spot_says_what_ctrl_c_leaves(cloud):
    answers = [ACTIVE, READY, workers("running", "running"), ["sleep", "Ctrl-C", ""]]
    done, did, _ = spot(cloud, answers)
    assert done.returncode == 130 and did == []
    assert "stopped watching first (ACTIVE)" in done.stdout
    assert "launch/tpu_vm.sh delete" in done.stdout


def test_spot_says_what_ctrl_c_leaves_while_it_looks(cloud):
    (cloud.folder / "bin/timeout").symlink_to(FAKE)
    done, _, _ = spot(cloud, [["tpu_vm.sh status", "Ctrl-C", ""]])
    assert done.returncode == 130 and "stopped watching first (UNKNOWN)" in done.stdout


def test_status_shows_another_error(cloud):
    cloud.answer([[DESCRIBE, 1, "ERROR: PERMISSION_DENIED\n"]])
    done = cloud.run("launch/tpu_vm.sh status")
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr and done.stdout == ""
