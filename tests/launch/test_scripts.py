"""What all scripts of launch/ have in common.

After a change of what they do or print:

    UPDATE_GOLDEN=1 .venv/bin/python -m pytest -n0 tests/launch -k golden

writes the golden output anew, for you to read.
"""

import os
from pathlib import Path
import subprocess

import pytest

from tests.launch.cloud import FAKE, LAUNCH, ROOT, tool

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
SOURCED = {"settings.sh", "shared.sh"}
# The arguments with which each script has its output in golden/.
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


def test_shellcheck():
    scripts = [*SCRIPTS, FAKE, ROOT / "benchmarks/on_gpu.sh"]
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
    path = Path(__file__).parent / "golden" / f"{script}.txt"
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
        ("MAX_FAILURES", "0", "1 or more"),
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
    """It may be meant for the run `second`, and would act on this one."""
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
