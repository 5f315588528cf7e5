"""Reads the profile that a run has written."""

import jax


def profiled_steps(workdir):
    """Numbers of the training steps in the profile of a run."""
    (path,) = workdir.rglob("*.xplane.pb")
    profile = jax.profiler.ProfileData.from_file(str(path))
    events = [event for plane in profile.planes for line in plane.lines for event in line.events]
    return [dict(event.stats)["step_num"] for event in events if event.name == "train"]
