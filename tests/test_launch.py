"""What the launchers in launch/ write and run, with fake versions of the clouds' commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
CONFIG = "configs/mythos_1b.yaml"
SETTINGS = {
    "TOPOLOGY": "v5p:2x2x4",
    "SLICES": "2",
    "BUCKET": "gs://bucket/",
    "IMAGE": "registry/image:1",
    "ZONE": "zone-a",
    "CLUSTER": "cluster",
    "LOCATION": "place",
    "RESTARTS": "2",
    "GRACE": "200",
}
CLOUD = ["gke", "gcluster", "tpu_vm", "skypilot"]


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher and records the commands that it calls; `fakes` maps a command to the body of a bash script."""

    def run(name, *words, fakes=None, **settings):
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        for command in ["mythos", "kubectl", "gcluster", "gcloud", "sky", "sbatch", "sleep"]:
            body = (fakes or {}).get(command, "exit 0")
            stdin = f"cat > {tmp_path}/stdin\n" if command == "kubectl" else ""
            (folder / command).write_text(
                f'#!/bin/bash\n{stdin}echo "{command} $*" >> {calls}\ncd {tmp_path}\n{body}\n'
            )
            (folder / command).chmod(0o755)
        environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path), **SETTINGS, **settings}
        done = subprocess.run(
            ["bash", LAUNCH / f"{name}.sh", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        done.calls = calls.read_text().splitlines() if calls.exists() else []
        return done

    return run


def test_the_jobset_field_by_field(launch):
    done = launch("gke", "--dry-run", CONFIG, "--training.steps", "7", "--data.sources", '["a b"]')
    assert done.returncode == 0, done.stderr
    assert done.calls == []
    jobset = yaml.safe_load(done.stdout)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "mythos-1b"
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 2,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)  # 16 chips, 4 per host
    assert job["completionMode"] == "Indexed"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": "mythos", "operator": "In", "values": [1, 2]}}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 200
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert "command" not in container  # the image's entry point is process 1 and receives the SIGTERM
    assert container["image"] == "registry/image:1"
    run = ["train", CONFIG, "--workdir", "gs://bucket/runs/mythos-1b"]
    assert container["args"] == [*run, "--training.steps", "7", "--data.sources", '["a b"]']
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "JAX_COMPILATION_CACHE_DIR": "gs://bucket/compiled",
        "MYTHOS_DATA_CACHE": "/data",
    }
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_gke_applies_the_jobset_that_the_dry_run_shows(launch, tmp_path):
    shown = launch("gke", "--dry-run", CONFIG).stdout
    done = launch("gke", CONFIG)
    assert done.calls == [f"mythos compile {CONFIG} --topology v5p:2x2x4 --slices 2", "kubectl apply -f -"]
    assert yaml.safe_load((tmp_path / "stdin").read_text()) == yaml.safe_load(shown)


def test_the_skypilot_job_field_by_field():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    assert task["resources"]["use_spot"] is True
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [42, 134], "max_restarts_on_errors": 0}
    assert set(task["envs"]) == {"CONFIG", "OVERRIDES", "RUN", "JAX_COMPILATION_CACHE_DIR"}
    assert (LAUNCH.parent / task["envs"]["CONFIG"]).is_file()
    # What `run` passes to mythos, on the second of two nodes.
    script = task["run"].replace("exec mythos", "echo $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID")
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    envs = {"CONFIG": CONFIG, "OVERRIDES": "--training.steps 5", "RUN": "gs://b/r", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", script], env=sky | envs, capture_output=True, text=True)
    assert done.stdout == f"10.0.0.1:8476 2 1 train {CONFIG} --workdir gs://b/r --training.steps 5\n"


def test_skypilot_sets_every_variable_of_the_job(launch):
    done = launch("skypilot", CONFIG, "--training.steps", "5", TOPOLOGY="")
    assert done.calls[0] == f"mythos info {CONFIG} --training.steps 5"
    for name in yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["envs"]:
        assert f"--env {name}=" in done.calls[1]
    assert "RUN=gs://bucket/runs/mythos-1b" in done.calls[1]


def test_gcluster_uses_googles_names_for_slices(launch):
    for topology, kind in [("v5p:2x2x4", "v5p-32"), ("v6e:4x4", "v6e-16"), ("v5e:16x16", "v5litepod-256")]:
        call = launch("gcluster", CONFIG, TOPOLOGY=topology).calls[-1]
        assert f"--compute-type {kind} --num-slices 2 --restarts 2 --grace-period 200" in call
        assert "--env JAX_COMPILATION_CACHE_DIR=gs://bucket/compiled" in call
        assert "--command exec mythos train" in call


@pytest.mark.parametrize("name", [*CLOUD, "slurm"])
@pytest.mark.parametrize("code", [1, 2])
def test_a_config_that_does_not_fit_is_not_launched(launch, name, code):
    done = launch(name, CONFIG, fakes={"mythos": f"exit {code}"})
    assert done.returncode == code
    assert done.calls == [f"mythos compile {CONFIG} --topology v5p:2x2x4 --slices 2"]


@pytest.mark.parametrize("name", [*CLOUD, "slurm", "local"])
def test_a_dry_run_shows_the_preflight_and_calls_nothing(launch, name):
    done = launch(name, "--dry-run", CONFIG, PYTHON="/bin/true")
    assert done.returncode == 0, done.stderr
    assert "'mythos' 'compile' 'configs/mythos_1b.yaml' '--topology' 'v5p:2x2x4'" in done.stdout
    assert done.calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"BUCKET": "/mnt/disk"}, "BUCKET: got '/mnt/disk', allowed: gs://"),
        ({"TOPOLOGY": "v5p-32"}, "TOPOLOGY: got 'v5p-32', allowed: v5e:AxB"),
        ({"IMAGE": ""}, "IMAGE is not set"),
    ],
)
def test_a_wrong_setting_is_a_one_line_error(launch, settings, message):
    done = launch("gke", CONFIG, **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.calls == []


# A queued resource that is active at once, and workers whose exit codes are the lines of `codes`.
GCLOUD = """
case "$*" in
*describe*) [ -e slice ] && cat slice || exit 1 ;;
*create*) echo ACTIVE > slice ;;
*delete*) rm -f slice ;;
*"cat /tmp/mythos.code"*) head -n 1 codes; sed -i 1d codes ;;
*"docker run"*) [ -e taken ] && mv taken slice; exit 0 ;;
esac
"""


@pytest.mark.parametrize(
    ("codes", "end", "runs"),
    [([0], 0, 1), ([42, "lost", 0], 0, 3), ([42, 1, 0], 1, 2), ([2, 0], 2, 1), ([42, 42, 42, 0], 42, 3)],
)
def test_tpu_vms_restart_after_42_up_to_the_limit(launch, tmp_path, codes, end, runs):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = launch("tpu_vm", CONFIG, fakes={"gcloud": GCLOUD}, SLICES="1")
    assert done.returncode == end, done.stderr
    assert sum("docker run" in call for call in done.calls) == runs
    assert sum("queued-resources create" in call for call in done.calls) == 1
    assert "queued-resources delete" in done.calls[-1]


def test_a_preempted_slice_is_requested_again(launch, tmp_path):
    (tmp_path / "codes").write_text("lost\n0\n")
    (tmp_path / "taken").write_text("SUSPENDED\n")
    done = launch("tpu_vm", CONFIG, fakes={"gcloud": GCLOUD})
    assert done.returncode == 0, done.stderr
    creates = [call for call in done.calls if "queued-resources create" in call]
    assert len(creates) == 2
    assert "--node-count 2 --node-prefix mythos-1b --spot --accelerator-type v5p-32" in creates[0]


def test_slurm_submits_the_batch_script(launch):
    done = launch(
        "slurm", CONFIG, "--training.steps", "5", BUCKET="", TOPOLOGY="", SHARED="/shared", NODES="4", GPUS="8"
    )
    assert done.calls[0] == f"mythos info {CONFIG} --training.steps 5"
    expected = "sbatch --job-name mythos-1b --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --signal TERM@200"
    assert done.calls[1] == f"{expected} {LAUNCH}/slurm.sbatch {CONFIG} --training.steps 5"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, 0), (1, 0, 0), (2, 0, 0), (42, 0, 1), (137, 1, 1), (42, 2, 0)]
)
def test_the_batch_script_requeues_runs_that_can_resume(tmp_path, code, restarts, requeued):
    for command, body in {"srun": f"exit {code}", "squeue": "echo RUNNING", "scontrol": "", "sleep": ""}.items():
        (tmp_path / command).write_text(f'#!/bin/bash\necho "{command} $*" >> {tmp_path}/calls\n{body}\n')
        (tmp_path / command).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RUN": "/r",
        "CACHE": "/c",
        "RESTARTS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "c.yaml"], env=environment, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == code
    assert "train c.yaml --workdir /r" in calls
    assert calls.count("scontrol requeue 7") == requeued


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("tests/*.sh"), *LAUNCH.glob("*.sbatch")]
    done = subprocess.run([SHELLCHECK, "-x", *scripts], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("kind", "extra"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_dockerfiles_copy_existing_files_and_install_known_extras(kind, extra):
    lines = (LAUNCH / f"Dockerfile.{kind}").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((LAUNCH.parent / name).exists() for name in line.split()[1:-1])
    assert f".[{extra},serve]" in "\n".join(lines)
    known = (LAUNCH.parent / "pyproject.toml").read_text()
    assert f"\n{extra} = [" in known
    assert "\nserve = [" in known
    assert lines[-1] == 'ENTRYPOINT ["mythos"]'


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
        assert "allowed: [--dry-run] MODEL [flags of mythos serve]" in done.stderr


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
