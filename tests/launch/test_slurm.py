"""launch/slurm.sbatch."""

import shutil

import pytest

from tests.launch.cloud import LAUNCH


@pytest.fixture
def cluster(cloud):
    """A function that submits a job: each of four processes ends with its word of $STATUSES."""
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
    """A new checkpoint resets the count."""
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
    assert options["signal"] == "TERM@300"  # not B:, which would signal only this script
    assert "requeue" in options and options["open-mode"] == "append"


def test_slurm_from_another_folder(cloud):
    done = cloud.run(f"bash {LAUNCH / 'slurm.sbatch'}", cwd=cloud.folder)
    assert done.returncode == 2 and "submit from the repository" in done.stderr
