"""What the launchers of servers write and run."""

import os
import subprocess

import pytest
import yaml

from tests.launch.conftest import LAUNCH


def rendered(launch, *words, **settings):
    done = launch("serve_gke", "--dry-run", *words, **{"TOPOLOGY": "", "BUCKET": "", "GRACE": "", **settings})
    assert done.returncode == 0, done.stderr
    assert done.calls == []
    deployment, service = yaml.safe_load_all(done.stdout)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return deployment, service, pod, container


def test_the_deployment_on_a_tpu_field_by_field(launch):
    settings = {"TOPOLOGY": "v6e:2x4", "BUCKET": "gs://bucket/", "GRACE": "60", "REPLICAS": "3", "SURGE": "0"}
    model = ("gs://bucket/runs/a", "--served-name", 'a "b" $c', "--places", "64")
    deployment, service, pod, container = rendered(launch, *model, **settings)
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    label = {"app": "mythos-serve"}
    spec = deployment["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == label
    assert spec["replicas"] == 3
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert service["spec"] == {
        "type": "ClusterIP",
        "selector": label,
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    }
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "2x4",
    }
    assert container["resources"] == {
        "requests": {"cpu": "4", "memory": "16Gi"},
        "limits": {"google.com/tpu": 8, "memory": "16Gi"},  # all chips of the host, as GKE wants
    }
    assert "command" not in container  # the image's entry point is process 1 and receives the SIGTERM
    assert container["args"] == [
        "serve", "gs://bucket/runs/a", "--host", "0.0.0.0", "--port", "8000", "--api-key-file", "/secrets/api-key",
        "--drain-seconds", "60", *model[1:],
    ]  # fmt: skip
    # Ten seconds before the SIGTERM and ten after the last request are the pod's, too.
    assert container["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "10"]}}
    assert pod["terminationGracePeriodSeconds"] == 60 + 20
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "HOME": "/scratch",
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
        "HF_TOKEN_PATH": "/secrets/hf-token",
        "MYTHOS_DATA_CACHE": "/scratch/data",
    }


@pytest.mark.parametrize("settings", [{"TOPOLOGY": "v5e:1x1"}, {"GPU": "nvidia-l4", "GPUS": "2"}])
def test_a_pod_can_write_to_its_scratch_space_alone_and_is_not_privileged(launch, settings):
    _, _, pod, container = rendered(launch, "org/Model", **settings)
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert "privileged" not in security
    assert "hostNetwork" not in pod
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert volumes["secrets"]["secret"] == {"secretName": "mythos-serve", "defaultMode": 0o440}
    assert mounts["/secrets"]["readOnly"] is True
    assert "emptyDir" in volumes[mounts["/scratch"]["name"]]
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    # No key in the arguments or in the environment.
    assert "--api-key-file" in container["args"]
    assert all("KEY" not in variable["name"] for variable in container["env"])


def test_the_deployment_on_a_gpu_runs_without_root(launch):
    _, _, pod, container = rendered(launch, "org/Model", GPU="nvidia-l4", GPUS="2")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "memory": "16Gi"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/scratch/compiled"


def test_gke_applies_the_deployment_that_the_dry_run_shows(launch, tmp_path):
    shown = launch("serve_gke", "--dry-run", "org/Model", TOPOLOGY="v6e:2x2").stdout
    assert launch("serve_gke", "org/Model", TOPOLOGY="v6e:2x2").calls == ["kubectl apply -f -"]
    assert (tmp_path / "stdin").read_text() == shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "TOPOLOGY: got 'v5p:2x2x4', allowed: a slice of one host"),
        ({"TOPOLOGY": "v6e:4x4"}, "TOPOLOGY: got 'v6e:4x4', allowed: a slice of one host"),
        ({"TOPOLOGY": "v6e:2x2", "GPU": "nvidia-l4"}, "TOPOLOGY and GPU: got both, allowed: one of them"),
        ({"TOPOLOGY": ""}, "TOPOLOGY is not set"),
        ({"IMAGE": ""}, "IMAGE is not set"),
        ({"TOPOLOGY": "v6e:2x2", "NAME": "My_model"}, "NAME: got 'My_model', allowed: lower case letters"),
        ({"TOPOLOGY": "v6e:2x2", "BUCKET": "/disk"}, "BUCKET: got '/disk', allowed: gs://"),
        ({"TOPOLOGY": "v6e:2x2", "SURGE": "2"}, "SURGE: got '2', allowed: 0 or 1"),
    ],
)
def test_a_wrong_setting_of_a_server_is_a_one_line_error(launch, settings, message):
    done = launch("serve_gke", "org/Model", **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.calls == []


def test_the_servers_launchers_say_what_they_take(launch):
    for name in ("serve_gke", "serve_slurm"):
        done = launch(name)
        assert done.returncode == 2
        assert "allowed: [--dry-run | --status | --logs] MODEL [flags of mythos serve]" in done.stderr


def test_slurm_submits_a_server(launch, tmp_path):
    key = tmp_path / "key"
    words = ("runs/a", "--places", "64")
    assert "allowed: a file that holds the key" in launch("serve_slurm", *words, KEY_FILE=str(key)).stderr
    key.write_text("secret\n")
    done = launch("serve_slurm", *words, KEY_FILE=str(key), GPUS="2")
    expected = "sbatch --job-name mythos-serve --gpus 2 --signal B:TERM@220"
    assert done.calls == [f"{expected} {LAUNCH}/serve.sbatch runs/a --places 64"]


def test_the_batch_script_of_a_server_becomes_mythos(tmp_path):
    (tmp_path / "mythos").write_text(f'#!/bin/bash\necho "$$ $JAX_COMPILATION_CACHE_DIR $*" > {tmp_path}/call\n')
    (tmp_path / "mythos").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PORT": "8123",
        "KEY_FILE": "/k",
        "CACHE": "/c",
        "GRACE": "60",
    }
    script = subprocess.Popen(
        ["bash", LAUNCH / "serve.sbatch", "runs/a", "--places", "64"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    printed, _ = script.communicate(timeout=60)
    # The same process, so that Slurm's SIGTERM reaches it.
    flags = "--places 64 --host 0.0.0.0 --port 8123 --api-key-file /k --drain-seconds 60"
    assert (tmp_path / "call").read_text() == f"{script.pid} /c serve runs/a {flags}\n"
    assert ":8123/v1" in printed
