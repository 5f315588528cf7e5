"""Stand-ins for the commands of the clouds."""

import dataclasses
from pathlib import Path
import shlex
import subprocess
import sys

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
FAKE = Path(__file__).with_name("fake.sh")
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


def tool(name: str) -> str:
    """A program that a Python package has installed."""
    return str(Path(sys.executable).with_name(name))


@dataclasses.dataclass
class Cloud:
    """Runs scripts where only the stand-ins of fake.sh answer."""

    folder: Path

    def __post_init__(self):
        (self.folder / "bin").mkdir()
        for name in FAKES:
            (self.folder / "bin" / name).symlink_to(FAKE)
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
