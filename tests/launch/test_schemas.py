"""What the launchers render is valid for the schemas of JobSet and Kubernetes, in which an unknown field is an error.

prune_schemas.py made schemas/ from theirs.
"""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from tests.launch.conftest import CONFIG, LAUNCH

SCHEMAS: dict[str, Any] = {
    kind: schema
    for name in ("jobset", "kubernetes")
    for kind, schema in json.loads((Path(__file__).parent / "schemas" / f"{name}.json").read_text()).items()
    if kind != "$comment"
}
EVERYTHING = {"SPOT": "1", "PRIORITY": "high", "ACCOUNT": "trainer"}


def problems(kind: str, resource: Any) -> list[str]:
    found = jsonschema_rs.validator_for(SCHEMAS[kind]).iter_errors(resource)
    return [f"{'.'.join(map(str, error.instance_path))}: {error.message}"[:300] for error in found]


@pytest.mark.parametrize(
    "settings", [{}, EVERYTHING, {"TOPOLOGY": "v5e:1x1", "SLICES": "1"}, {"HOST_NETWORK": "1", **EVERYTHING}]
)
def test_the_jobset_is_valid(launch, settings):
    jobset = yaml.safe_load(launch("gke", "--dry-run", CONFIG, **settings).stdout)
    assert problems("JobSet", jobset) == []
    (replicated,) = jobset["spec"]["replicatedJobs"]
    # Kubernetes' own Job, of which the CRD holds a copy of its time.
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **replicated["template"]}
    assert problems("Job", job) == []
    # What JobSet's webhook asks beyond the schema: names of rules, unique and of its form.
    names = [rule["name"] for rule in jobset["spec"]["failurePolicy"]["rules"]]
    assert len(set(names)) == len(names)
    assert all(name.isalnum() for name in names)


@pytest.mark.parametrize("settings", [{"TOPOLOGY": "v6e:2x4"}, {"TOPOLOGY": "", "GPU": "nvidia-l4"}])
def test_the_deployment_and_the_service_are_valid(launch, settings):
    settings = settings | {"SPOT": "1", "PRIORITY": "high", "BUCKET": "", "SURGE": "0"}
    shown = launch("serve_gke", "--dry-run", "org/Model", **settings).stdout
    kinds = [resource["kind"] for resource in yaml.safe_load_all(shown)]
    assert kinds == ["Deployment", "Service"]
    for resource in yaml.safe_load_all(shown):
        assert problems(resource["kind"], resource) == []


def test_the_schemas_see_what_is_wrong(launch):
    jobset = yaml.safe_load(launch("gke", "--dry-run", CONFIG).stdout)
    rule = jobset["spec"]["failurePolicy"]["rules"][0]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    del rule["name"]
    job["template"]["spec"]["hostnetwork"] = True
    job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] = [4]
    job["completions"] = "four"
    found = "\n".join(problems("JobSet", jobset))
    for word in ('"name" is a required property', "hostnetwork", "google.com/tpu", "four"):
        assert word in found


def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    (resources,) = task.resources
    assert task.num_nodes == 2
    assert resources.accelerators == {"H100": 8}
    assert resources.use_spot
    assert resources.extract_docker_image() == "python:3.11-slim"
