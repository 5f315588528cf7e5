"""launch/gke.sh and its JobSet."""

import json

from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
import pytest
import yaml


def manifest(cloud, **settings) -> dict:
    done = cloud.run("launch/gke.sh apply", **settings)
    assert done.returncode == 0, done.stderr
    assert cloud.calls()[-1][:4] == ["kubectl", "apply", "-f", "-"]
    return yaml.safe_load(cloud.calls()[-1][4])


def fits_schema(jobset: dict) -> bool:
    """Whether every field is in JobSet's schema: its models drop all others."""
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
    """Kubernetes takes the first rule that fits, or else counts the failure; its limit is 0."""
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
