"""The scripts in launch/, with stand-ins for the commands of the clouds.

After a change of what they do:

    UPDATE_GOLDEN=1 .venv/bin/python -m pytest -n0 tests/test_launch.py -k golden

writes tests/golden anew, for you to read.
"""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import time

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from packaging.requirements import Requirement
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
SOURCED = {"settings.sh", "shared.sh"}
FAKES = ("gcloud", "kubectl", "docker", "sleep", "sbatch", "scontrol", "srun", "lsb_release", "id")
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "RUN_NAME": "first",
    "BUCKET": "my-bucket",
    "REPOSITORY": "https://example.com/convstem_jax.git",
    "COMMIT": "0123456789abcdef0123456789abcdef01234567",
    "FIELDS": "lr=5e-4 mean=(0.5,0.5,0.5)",
    "IMAGE": "example.com/images/convstem_jax",
    "CLUSTER": "my-cluster",
}
# The words after each script whose output is in tests/golden.
GOLDEN = {
    "data.sh": [""],
    "docker.sh": ["build", "run --config.epochs=1", "push"],
    "gke.sh": ["apply", "status", "logs --follow", "delete", "xpk"],
    "multi_gpu.sh": ["", "0,1,2,3"],
    "slurm.sbatch": [""],
    "tpu_spot.sh": [""],
    "tpu_vm.sh": ["create", "setup", "run", "status", "logs --all", "stop", "delete"],
    "worker.sh": ["setup", "start python -m convstem_jax.main", "log --follow"],
}


def tool(name: str) -> str:
    """A program that a Python package brought."""
    return str(Path(sys.executable).with_name(name))


@dataclasses.dataclass
class Cloud:
    """Runs scripts where only the stand-ins of tests/fake_cloud/fake.sh answer."""

    folder: Path

    def __post_init__(self):
        (self.folder / "bin").mkdir()
        for name in FAKES:
            (self.folder / "bin" / name).symlink_to(ROOT / "tests/fake_cloud/fake.sh")
        self.home = self.folder / "home"
        self.home.mkdir()
        self.answer([])

    def answer(self, answers: list) -> None:
        """What the commands will answer: [words, status, output], see fake.sh."""
        escaped = str.maketrans({"\\": r"\\", "\n": r"\n", "\t": r"\t"})
        lines = [f"{words}\t{status}\t{out.translate(escaped)}\n" for words, status, out in answers]
        (self.folder / "answers").write_text("".join(lines))

    def run(self, command: str, *, cwd: Path = ROOT, **settings) -> subprocess.CompletedProcess:
        env = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.home),
            "HOSTNAME": "host-0",
            "FAKE_CALLS": str(self.folder / "calls"),
            "FAKE_ANSWERS": str(self.folder / "answers"),
            **SETTINGS,
            **settings,
        }
        # Tests that run in the background may have Ctrl-C ignored, and bash could not catch it.
        words = ["env", "--default-signal=INT", *shlex.split(command)]
        return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, timeout=200)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        calls = path.read_text().split("\x1e")[:-1] if path.exists() else []
        return [call.split("\x1f")[:-1] for call in calls]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


# --- All scripts ---


def test_shellcheck():
    scripts = [*SCRIPTS, ROOT / "tests/fake_cloud/fake.sh", ROOT / "benchmarks/on_gpu.sh"]
    command = [tool("shellcheck"), "--external-sources", *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", GOLDEN)
def test_help(cloud, script):
    done = cloud.run(f"{LAUNCH / script} --help")
    assert done.returncode == 0, done.stderr
    assert script in done.stdout and "--dry-run" in done.stdout
    assert not done.stdout.startswith("#") and "set -e" not in done.stdout
    assert cloud.calls() == []


def test_every_script_has_golden_output():
    assert sorted(GOLDEN) == [s.name for s in SCRIPTS if s.name not in SOURCED]


@pytest.mark.parametrize("script", GOLDEN)
def test_golden(cloud, script):
    cloud.answer([["lsb_release", 0, "jammy\n"], ["id", 0, "1000\n"]])
    text = ""
    for arguments in GOLDEN[script]:
        command = f"launch/{script} --dry-run {arguments}".strip()
        done = cloud.run(command, USER="me")
        assert done.returncode == 0, done.stderr
        text += f"$ {command}\n{done.stdout.replace(str(cloud.home), '~')}\n"
    assert {call[0] for call in cloud.calls()} <= {"lsb_release", "id"}
    path = ROOT / "tests/golden" / f"{script}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PROJECT", "", "export PROJECT="),
        ("ZONE", "", "export ZONE="),
        ("ZONE", "us-west4", "as in us-west4-a"),
        ("RUN_NAME", "My Run", "RUN_NAME=My Run"),
        ("BUCKET", "gs://my-bucket", "without gs://"),
        ("BUCKET", "", "export BUCKET="),
        ("REPOSITORY", "", "export REPOSITORY="),
        ("COMMIT", "main; rm -r .", "hexadecimal"),
        ("CONFIG", "vitc", "configs/vitc.py"),
        ("FIELDS", "lr", "give NAME=VALUE"),
        ("WORKDIR", "runs/first", "absolute"),
        ("SPOT", "maybe", "yes or no"),
        ("MAX_FAILURES", "0", "from 1"),
    ],
)
def test_wrong_settings(cloud, name, value, words):
    done = cloud.run("launch/tpu_spot.sh", **{name: value})
    assert done.returncode == 2
    assert words in done.stderr and name in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert cloud.calls() == []


@pytest.mark.parametrize("script", GOLDEN)
def test_unknown_words(cloud, script):
    done = cloud.run(f"launch/{script} nonsense")
    assert done.returncode == 2 and "nonsense" in done.stderr
    assert cloud.calls() == []


@pytest.mark.parametrize("words", ["tpu_vm.sh delete", "gke.sh delete", "docker.sh push"])
def test_more_words_than_it_takes(cloud, words):
    """Not the run of another name, as it may be meant."""
    done = cloud.run(f"launch/{words} second")
    assert done.returncode == 2 and "unexpected argument 'second'" in done.stderr
    assert cloud.calls() == []


def test_without_a_bucket_a_run_stays_on_this_machine(cloud):
    done = cloud.run("launch/multi_gpu.sh --dry-run", BUCKET="", FIELDS="")
    assert f"--workdir {ROOT}/runs/first" in done.stdout and "data_dir" not in done.stdout
    done = cloud.run("launch/tpu_vm.sh create", BUCKET="")
    assert done.returncode == 2 and "export BUCKET=" in done.stderr and cloud.calls() == []


@pytest.mark.parametrize("script", GOLDEN)
def test_secrets_stay_secret(cloud, script):
    secret = "hunter2hunter2"
    secrets = {name: secret for name in ("GITHUB_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    for arguments in GOLDEN[script]:
        command = f"launch/{script} --dry-run {arguments}"
        done = cloud.run(command, **secrets)
        assert done.returncode == 0 and secret not in done.stdout + done.stderr
        if script == "worker.sh":  # it knows no settings
            continue
        done = cloud.run(command, REPOSITORY=f"https://me:{secret}@example.com/code.git", **secrets)
        assert done.returncode == 2 and "REPOSITORY holds" in done.stderr
        assert secret not in done.stdout + done.stderr
    assert secret not in str(cloud.calls())


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ("0 0 0", "0"),
        ("0 running 0", "running"),
        ("75 75", "75"),
        ("0 lost", "75"),
        ("137 0", "75"),
        ("128 255", "75"),
        ("75 running", "leaving"),
        ("75 2 running", "2"),
        ("75 3 137", "3"),
        ("4 75", "4"),
        ("5 1", "5"),
        ("1 75 lost", "1"),
        ("6 75", "6"),
        ("127 running", "127"),
    ],
)
def test_status_of_a_run(cloud, states, status):
    done = cloud.run(f"bash -c '. launch/shared.sh; run_status {states}'")
    assert done.stdout.strip() == status, done.stderr


# --- Spot TPU VMs ---

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
    """Runs tpu_spot.sh; returns its result, what it did without looking, and its waits."""
    cloud.answer(answers)
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
    """Those of its beginning, whatever is committed or edited while it is watched."""
    script = '. launch/shared.sh; bash -c "echo \\$COMMIT \\$RUN_NAME"'
    done = cloud.run(shlex.join(["env", "-u", "COMMIT", "-u", "RUN_NAME", "bash", "-c", script]))
    commit, name = done.stdout.split()
    assert len(commit) == 40 and name == "convstem"


@pytest.mark.parametrize("words", [DESCRIBE, NODE])
def test_spot_deletes_nothing_while_google_does_not_answer(cloud, words):
    """Nor does it tell the same every minute."""
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
    (cloud.folder / "bin/timeout").symlink_to(ROOT / "tests/fake_cloud/fake.sh")
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
    """Only on machines that it requested itself and never reached there cannot be a healthy run."""
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
    (cloud.folder / "bin/grep").symlink_to(ROOT / "tests/fake_cloud/fake.sh")
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
    assert done.stdout.count("no new checkpoint in 60 looks") == 1
    assert done.stdout.count("no new checkpoint in 120 looks") == 1


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
    # Three failures, a checkpoint, then three and the fourth.
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
    """Where the request's answer was lost, it may be gone."""
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
    (cloud.folder / "bin/timeout").symlink_to(ROOT / "tests/fake_cloud/fake.sh")
    done, _, _ = spot(cloud, [["tpu_vm.sh status", "Ctrl-C", ""]])
    assert done.returncode == 130 and "stopped watching first (UNKNOWN)" in done.stdout


def test_status_shows_another_error(cloud):
    cloud.answer([[DESCRIBE, 1, "ERROR: PERMISSION_DENIED\n"]])
    done = cloud.run("launch/tpu_vm.sh status")
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr and done.stdout == ""


# --- Data of a TPU VM ---

GB = 10**9
SIZED = ["storage du", 0, f"{150 * GB}  gs://my-bucket/data\n"]


def fill(cloud, answers, *, disk: int, memory: int, folder: str = "", **settings):
    """Runs data.sh where disk and memory have so many GB; returns its result and what it did."""
    for name in ("sudo", "df", "free"):
        (cloud.folder / "bin" / name).symlink_to(ROOT / "tests/fake_cloud/fake.sh")
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
    assert "150 GB for" in done.stdout and "160 GB free" in done.stdout


def test_data_go_to_memory_where_the_disk_is_too_small(cloud):
    done, did = fill(cloud, [SIZED], disk=90, memory=190, MEMORY_RESERVE_GB="38")
    assert done.returncode == 0, done.stderr
    size = 150 * GB + 2**30
    assert did[0] == f"sudo mount --types tmpfs --options size={size},mode=0777 data {cloud.home}"
    assert did[1].startswith("gcloud storage rsync")


@pytest.mark.parametrize("size, memory", [(2 * 10**6, 1), (2 * 10**6 + 4000, 9)])
def test_what_is_there_already_needs_no_room(cloud, size, memory):
    """Files take whole pages, so that all of it may look larger than in the bucket."""
    (cloud.home / "part").write_bytes(bytes(2 * 10**6))
    du = ["storage du", 0, f"{size}  gs://my-bucket/data\n"]
    done, did = fill(cloud, [du], disk=1, memory=memory)
    assert done.returncode == 0 and len(did) == 1, done.stderr


@pytest.mark.parametrize(
    ("answer", "memory", "folder", "status", "words"),
    [
        (SIZED, 180, "", 2, "150 GB of data"),
        # A file system in memory that is there already, and too small.
        (SIZED, 900, "/dev/shm", 2, "150 GB of data"),
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


# --- A TPU VM's own script: this one runs for real ---


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
        """Until its state is another than this; returns that."""
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
    (worker.cloud.folder / "bin/python3").symlink_to(ROOT / "tests/fake_cloud/fake.sh")
    nothing = {"BUCKET": "", "DATA_SOURCE": "", "WORKDIR": "/tmp"}
    done = worker.cloud.run(f"{LAUNCH}/worker.sh setup", **nothing)
    assert done.returncode == min(status, 1), done.stderr


def set_up(worker, answers, *more: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Its result, and what root did, where there are also these programs."""
    names = ("sudo", "stat", "mountpoint", "sleep", "python3", ".local/bin/uv")
    (worker.cloud.home / ".local/bin").mkdir(parents=True)
    for name in (*names, *more):
        folder = worker.cloud.folder / "bin" if "/" not in name else worker.cloud.home
        (folder / name).symlink_to(ROOT / "tests/fake_cloud/fake.sh")
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
    """Its processes cannot be ended."""
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
    for finished in ("90", "100", "100/state", "110/state"):  # 110 is being saved
        (worker.workdir / "checkpoints" / finished).mkdir(parents=True)
        (worker.workdir / "checkpoints" / finished / "commit_success.txt").touch()
    # What it leaves behind holds nothing up.
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


# --- GKE ---


def manifest(cloud, **settings) -> dict:
    done = cloud.run("launch/gke.sh apply", **settings)
    assert done.returncode == 0, done.stderr
    assert cloud.calls()[-1][:4] == ["kubectl", "apply", "-f", "-"]
    return yaml.safe_load(cloud.calls()[-1][4])


def fits_schema(jobset: dict) -> bool:
    """Whether every field is one of the JobSet's: the models drop the others."""
    return JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset


def test_jobset(cloud):
    fields = {"GKE_TOPOLOGY": "4x4x8", "FIELDS": 'dataset="a\\b"'}
    jobset = manifest(cloud, **fields)
    assert fits_schema(jobset)
    assert "${" not in json.dumps(jobset)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 32
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    container = pod["containers"][0]
    assert container["args"][-1] == '--config.dataset="a\\b"'
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/mnt/bucket", "/mnt/data", "/dev/shm"} == mounts
    # The driver mounts its cache itself.
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert volumes.keys() - mounted == {"gke-gcsfuse-cache"} and mounted <= volumes.keys()
    bucket = volumes["bucket"]["csi"]["volumeAttributes"]
    assert "write:enable-streaming-writes:false" in bucket["mountOptions"].split(",")
    data = volumes["data"]["csi"]["volumeAttributes"]
    assert data["fileCacheCapacity"] == "160Gi"
    assert "file-cache:cache-file-for-range-read:true" in data["mountOptions"].split(",")


def test_jobset_without_spot(cloud):
    spot_jobset, jobset = manifest(cloud), manifest(cloud, SPOT="no")
    assert fits_schema(jobset)
    assert "gke-spot" in json.dumps(spot_jobset) and "gke-spot" not in json.dumps(jobset)


@pytest.mark.parametrize(
    ("path", "name", "wrong"),
    [
        ((), "failurePolicy", "failurePolicies"),
        (("failurePolicy",), "maxRestarts", "maxRestart"),
        (("replicatedJobs", 0, "template", "spec"), "backoffLimit", "backofLimit"),
        (("replicatedJobs", 0, "template", "spec", "template", "spec"), "nodeSelector", "selector"),
    ],
)
def test_jobset_with_a_misspelt_field(cloud, path, name, wrong):
    jobset = manifest(cloud)
    place = jobset["spec"]
    for key in path:
        place = place[key]
    place[wrong] = place.pop(name)
    assert not fits_schema(jobset)


@pytest.mark.parametrize(
    ("status", "disrupted", "again"),
    [(s, False, False) for s in (1, 2, 3, 4, 5, 6, 127)]
    + [(s, False, True) for s in (75, 128, 137, 143, 255)]
    + [(2, True, True)],
)
def test_jobset_after_a_failure(cloud, status, disrupted, again):
    """Kubernetes takes the first rule that fits; without one it counts the failure, up to 0."""
    spec = manifest(cloud)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    action = "Count"
    for rule in job["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            fits = disrupted
        else:
            codes = rule["onExitCodes"]
            assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
            fits = (status in codes["values"]) == (codes["operator"] == "In")
        if fits:
            action = rule["action"]
            break
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    reason = {"Count": "BackoffLimitExceeded", "FailJob": "PodFailurePolicy"}[action]
    [rule] = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert (reason not in rule["onJobFailureReasons"]) == again


@pytest.mark.parametrize("ended", ["", "Failed"])
def test_gke_starts_a_run_again_that_has_ended(cloud, ended):
    cloud.answer([["kubectl get jobset", 0, ended]])
    done = cloud.run("launch/gke.sh apply")
    assert done.returncode == 0 and ("has ended (Failed)" in done.stdout) == bool(ended)
    commands = [call[1] for call in cloud.calls()]
    assert commands == ["get", *["delete"] * bool(ended), "apply"]


def test_gke_names_what_is_missing(cloud):
    done = cloud.run("launch/gke.sh apply", IMAGE="convstem_jax")
    assert done.returncode == 2 and "names no registry" in done.stderr
    done = cloud.run("launch/gke.sh apply", GKE_TOPOLOGY="1x1")
    assert done.returncode == 2 and "fewer chips" in done.stderr
    assert cloud.calls() == []


# --- SLURM ---


@pytest.fixture
def cluster(cloud):
    """A folder to submit from, where each of four processes ends with its word of $STATUSES."""
    shutil.copytree(LAUNCH, cloud.folder / "code/launch")
    python = cloud.folder / "code/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/bash\nset -- $STATUSES\ns=${@:SLURM_PROCID+1:1}\n"
        "[[ -z ${NEW:-} ]] || { mkdir -p $WORKDIR/checkpoints/${NEW%/*}\n"
        "touch $WORKDIR/checkpoints/$NEW; }\n"
        "[[ $s != dead ]] || kill -9 $PPID\nexit $s\n"
    )
    srun = cloud.folder / "bin/srun"
    srun.unlink()
    srun.write_text(
        '#!/bin/bash\nshift 3; for i in 0 1 2 3; do SLURM_PROCID=$i "$@" & done; wait; exit 137\n'
    )
    for path in (python, srun):
        path.chmod(0o755)

    def run(statuses: str, **settings):
        slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "STATUSES": statuses}
        slurm |= {"WORKDIR": str(cloud.folder / "run")}
        done = cloud.run("bash launch/slurm.sbatch", cwd=cloud.folder / "code", **slurm, **settings)
        assert not list(cloud.folder.glob("code/.slurm*"))
        return done.returncode, cloud.calls()

    return run


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ("0 0 0 0", 0),
        ("75 75 75 75", 75),
        ("75 2 75 75", 2),
        ("75 75 1 75", 1),
        ("75 dead 75 75", 75),
        ("dead dead dead dead", 75),
        ("0 0 0 dead", 75),
    ],
)
def test_slurm_requeues_after_75_alone(cluster, statuses, status):
    returncode, calls = cluster(statuses)
    assert returncode == status
    assert calls == ([["scontrol", "requeue", "7"]] if status == 75 else [])


def test_slurm_does_not_requeue_for_ever(cluster):
    assert cluster("75 75 75 75", MAX_RESTARTS="3", SLURM_RESTART_COUNT="3") == (75, [])


def test_slurm_gives_up_without_progress(cluster, cloud):
    """A new checkpoint begins the count anew."""
    file = "commit_success.txt"
    saved = "", f"100/{file}", f"200/{file}", "", f"300/state/{file}"
    for step, num_calls in zip(saved, (1, 2, 3, 4, 4), strict=True):
        status, calls = cluster("75 75 75 75", MAX_FAILURES="2", NEW=step)
        assert (status, len(calls)) == (75, num_calls), step


def test_slurm_options():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    body = next(i for i, s in enumerate(lines) if s and not s.startswith("#"))
    directives = [i for i, s in enumerate(lines) if s.startswith("#SBATCH")]
    assert max(directives) < body, "sbatch reads no directive after the first command"
    options = dict(lines[i].removeprefix("#SBATCH --").partition("=")[::2] for i in directives)
    assert options["ntasks-per-node"] == options["gpus-per-node"], "JAX wants one for each GPU"
    [srun] = [line for line in lines if line.startswith("run srun")]
    assert "--cpus-per-task=" in srun, "srun does not take sbatch's by itself"
    assert options["signal"] == "TERM@300"  # not B:, which would signal this script alone
    assert "requeue" in options and options["open-mode"] == "append"


def test_slurm_from_another_folder(cloud):
    done = cloud.run(f"bash {LAUNCH / 'slurm.sbatch'}", cwd=cloud.folder)
    assert done.returncode == 2 and "submit from the repository" in done.stderr


# --- SkyPilot ---


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["file_mounts"]["/mnt/data"] == "gs://${BUCKET}/data", "copied, not mounted"
    # Fields of SkyPilot 0.14's schema; it refuses others.
    assert set(task) <= {
        "name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run",
    }  # fmt: skip
    assert set(task["resources"]) <= {"accelerators", "use_spot", "disk_size", "job_recovery"}
    recovery = {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75]}
    assert task["resources"]["job_recovery"] == recovery
    for part in ("setup", "run"):
        # What is in capitals comes from outside.
        command = [tool("shellcheck"), "--shell=bash", "--exclude=SC2153", "-"]
        done = subprocess.run(command, input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        used = set(re.findall(r"\$\{?([A-Z_]+)", task[part]))
        assert {name for name in used if not name.startswith("SKYPILOT_")} <= set(task["envs"])


@pytest.fixture
def node(tmp_path):
    """A function that runs the task on one of two nodes, with `program` in place of Python."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)

    def run(program, **envs):
        python.write_text(f"#!/bin/bash\n{program}\n")
        python.chmod(0o755)
        nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
        env = {"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_RANK": "1", **nodes, **task["envs"], **envs}
        script = task["run"].replace("/mnt/bucket", str(tmp_path / "bucket"))
        command = ["bash", "-c", script]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_skypilot_starts_the_program(node, tmp_path, device):
    done = node('printf "%s\\n" "$@"', BUCKET="b", FIELDS="lr=1 wd=2", DEVICE=device)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:4] == ["-m", "convstem_jax.main", "--config", "configs/vitc.py:4gf"]
    assert {"--config.lr=1", "--config.wd=2", f"{tmp_path}/bucket/runs/convstem"} <= set(words)
    told = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]
    assert words[-6:] == told if device == "gpu" else "--coordinator" not in words


def test_skypilot_gives_up_without_progress(node, tmp_path):
    """A new checkpoint begins the count anew, and so does giving up: a person starts it then."""
    statuses = []
    for step in ("", "100", "", "", "", ""):
        folder = f"bucket/runs/convstem/checkpoints/{step}"
        save = f"mkdir -p {folder}; touch {folder}/commit_success.txt" if step else ""
        statuses.append(node(f"{save}\nexit 75", BUCKET="b").returncode)
    assert statuses == [75, 75, 75, 75, 1, 75]
    assert node("exit 3", BUCKET="b").returncode == 3
    assert not list((tmp_path / "bucket/runs/convstem").glob(".failures*"))


# --- Containers and what is installed in them ---


def test_dockerfile():
    command = [tool("hadolint"), str(LAUNCH / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = (LAUNCH / "Dockerfile").read_text()
    [copied] = re.findall(r"^COPY (requirements.*) \./$", text, re.MULTILINE)
    [install] = re.findall(r"^RUN pip install .*$", text, re.MULTILINE)
    for device in ("gpu", "tpu"):
        names = copied.replace("${DEVICE}", device).split()
        assert all((ROOT / name).is_file() for name in names)
        assert re.findall(r"-r (\S+)", install.replace("${DEVICE}", device)) == names
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {"convstem_jax", "configs", "datasets", "launch"} & set(ignored)
    # Data that are not for others' eyes, among them.
    of_git = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    assert of_git <= {line.removeprefix("**/") for line in ignored}


def locked(name: str) -> dict[tuple[str, str], str]:
    """(package, marker) -> version and hashes."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if match := re.match(r"([\w.-]+)==(\S+)(?: ; (.*?))?\s+(--hash.*)", line):
            package, version, marker, hashes = match.groups()
            found[package, marker or ""] = f"{version} {' '.join(sorted(hashes.split()))}"
    return found


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_lock_files_fit_together(device):
    base, more = locked("requirements.lock"), locked(f"requirements-{device}.lock")
    names = {package for package, _ in base}
    new = {package for package, _ in more} - names
    assert {"gpu": "jax-cuda12-plugin", "tpu": "libtpu"}[device] in new
    for key, pinned in more.items():
        if key[0] in names:
            assert any(base[k] == pinned for k in base if k[0] == key[0]), key
    # What this JAX itself asks for.
    extra = {"gpu": "cuda12", "tpu": "tpu"}[device]
    for requirement in map(Requirement, importlib.metadata.requires("jax")):
        if requirement.marker and requirement.marker.evaluate({"extra": extra}):
            environment = {"extra": extra}
            pins = [
                pinned.split()[0]
                for (package, marker), pinned in more.items()
                if package == requirement.name
                and (not marker or Requirement(f"x; {marker}").marker.evaluate(environment))
            ]
            assert len(pins) == 1 and requirement.specifier.contains(pins[0]), requirement


@pytest.mark.skipif("ONLINE" not in os.environ, reason="fetches up to 3 GB: set ONLINE=1")
@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_pip_finds_what_is_locked(device):
    """`make check-install` installs for real."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--require-hashes"]
    command += ["-r", "requirements.lock", "-r", f"requirements-{device}.lock"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
