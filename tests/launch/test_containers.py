"""launch/Dockerfile, and the lock files that are installed in it."""

import importlib.metadata
import re
import subprocess

from packaging.requirements import Requirement
import pytest

from tests.launch.cloud import LAUNCH, ROOT, tool


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
    # Private data, among others.
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
    # What this JAX itself requires.
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
