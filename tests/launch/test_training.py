"""What the launchers of training write and run."""

import os
import re
import signal
import subprocess

import pytest
import yaml

from mythos_jax.errors import RESTART
from tests.launch.conftest import CLOUD, CONFIG, LAUNCH


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
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 2
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)  # 16 chips, 4 per host
    assert job["completionMode"] == "Indexed"
    disrupted, rule = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
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
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0}
    assert set(task["envs"]) == {"CONFIG", "OVERRIDES", "RUN", "JAX_COMPILATION_CACHE_DIR", "RESTARTS"}
    assert (LAUNCH.parent / task["envs"]["CONFIG"]).is_file()


@pytest.mark.parametrize(
    ("codes", "end"), [([0], 0), ([42, 134, 0], 0), ([42, 1, 0], 1), ([2, 0], 2), ([42, 42, 137, 0], 137)]
)
def test_a_node_of_skypilot_restarts_mythos_up_to_the_limit(tmp_path, codes, end):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    (tmp_path / "mythos").write_text(
        "#!/bin/bash\necho $JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*\n"
        f"cd {tmp_path}; code=$(head -n 1 codes); sed -i 1d codes; exit $code\n"
    )
    (tmp_path / "mythos").chmod(0o755)
    script = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    # The second of two nodes.
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    envs = {"CONFIG": CONFIG, "OVERRIDES": "--training.steps 5", "RUN": "gs://b/r", "RESTARTS": "2"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=sky | envs | path, capture_output=True, text=True)
    assert done.returncode == end
    calls = [line for line in done.stdout.splitlines() if line.startswith("10.0.0.1")]
    ran = len(codes) - len((tmp_path / "codes").read_text().splitlines())
    assert calls == [f"10.0.0.1:8476 2 1 train {CONFIG} --workdir gs://b/r --training.steps 5"] * ran


def test_skypilot_sets_every_variable_of_the_job(launch):
    done = launch("skypilot", CONFIG, "--training.steps", "5", TOPOLOGY="")
    assert done.calls[0] == f"mythos info {CONFIG} --training.steps 5"
    for name in yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["envs"]:
        assert f"--env {name}=" in done.calls[1]
    assert "RUN=gs://bucket/runs/mythos-1b" in done.calls[1]


def test_gcluster_counts_chips_and_names_the_codes_to_restart_after(launch):
    for topology, kind in [("v5p:2x2x4", "v5p-16"), ("v6e:4x4", "v6e-16"), ("v5e:16x16", "v5litepod-256")]:
        call = launch("gcluster", CONFIG, TOPOLOGY=topology).calls[-1]
        shape = topology.partition(":")[2]
        assert (
            f"--compute-type {kind} --topology {shape} --num-slices 2 --restarts 2 --restart-on-exit-codes 42," in call
        )
        assert (
            "--grace-period 200 --command exec env JAX_COMPILATION_CACHE_DIR='gs://bucket/compiled' mythos train"
            in call
        )
        assert " --env " not in call  # not in version 1.95
    (codes,) = re.findall(r"--restart-on-exit-codes (\S+)", call)
    assert {1, 2, 130} & {int(code) for code in codes.split(",")} == set()
    assert {RESTART, 128 + signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGABRT} <= set(
        map(int, codes.split(","))
    )
    assert "--service-account" not in call
    call = launch("gcluster", CONFIG, ACCOUNT="me", PRIORITY="high", SPOT="1").calls[-1]
    for words in ("--service-account me", "--priority high", "--node-constraint cloud.google.com/gke-spot=true"):
        assert words in call


def rules_taken(jobset, condition, code):
    """What JobSet does with a pod that ended with this condition and exit code, by its rules and the messages of
    Kubernetes' Job controller (pkg/controller/job/pod_failure_policy.go)."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(replicated["template"]["spec"]["podFailurePolicy"]["rules"]):
        if any(pattern["type"] == condition for pattern in rule.get("onPodConditions", [])):
            message = f"Pod default/a has condition {condition} matching {rule['action']} rule at index {i}"
            reason = "PodFailurePolicy"
            break
        if code in rule.get("onExitCodes", {}).get("values", []):
            message = (
                f"Container mythos for pod default/a failed with exit code {code} matching {rule['action']} rule at"
            )
            reason = "PodFailurePolicy"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_the_jobset_counts_no_preemption_and_retries_no_wrong_input(launch):
    jobset = yaml.safe_load(launch("gke", "--dry-run", CONFIG).stdout)
    assert rules_taken(jobset, None, 42) == rules_taken(jobset, None, 137) == "RestartJobSet"
    assert rules_taken(jobset, None, 1) == rules_taken(jobset, None, 2) == "FailJobSet"
    for code in (1, 42, 143):
        assert rules_taken(jobset, "DisruptionTarget", code) == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"),
    [
        ({"TOPOLOGY": "v5e:1x1"}, 1, 1),
        ({"TOPOLOGY": "v6e:2x2"}, 4, 1),
        ({"TOPOLOGY": "v6e:2x4"}, 8, 1),
        ({"TOPOLOGY": "v5e:2x4", "HOST_CHIPS": "4"}, 4, 2),
        ({"TOPOLOGY": "v5e:4x4"}, 4, 4),
        ({"TOPOLOGY": "v5p:2x2x1"}, 4, 1),
    ],
)
def test_pods_ask_for_the_chips_that_hosts_have(launch, topology, chips, hosts):
    jobset = yaml.safe_load(launch("gke", "--dry-run", CONFIG, **topology).stdout)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (container["resources"]["limits"]["google.com/tpu"], job["parallelism"], job["completions"]) == (
        chips,
        hosts,
        hosts,
    )


def test_spot_nodes_an_account_and_a_priority(launch):
    def pod(**settings):
        jobset = yaml.safe_load(launch("gke", "--dry-run", CONFIG, **settings).stdout)
        return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]

    plain = pod()
    assert plain["hostNetwork"] is True
    assert "cloud.google.com/gke-spot" not in plain["nodeSelector"]
    assert {"serviceAccountName", "priorityClassName"} & set(plain) == set()
    asked = pod(SPOT="1", ACCOUNT="trainer", PRIORITY="high")
    assert asked["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert asked["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert (asked["serviceAccountName"], asked["priorityClassName"]) == ("trainer", "high")
    # Workload Identity, by which the account may use the bucket, does not work in the host's network.
    assert asked["hostNetwork"] is False
    assert pod(ACCOUNT="trainer", HOST_NETWORK="1")["hostNetwork"] is True


@pytest.mark.parametrize(
    ("name", "status", "logs"),
    [
        (
            "gke",
            "kubectl get jobset mythos-1b",
            "kubectl logs -f --tail 100 -l jobset.sigs.k8s.io/jobset-name=mythos-1b,",
        ),
        (
            "gcluster",
            "gcluster job list --name-contains mythos-1b --cluster cluster",
            "gcluster job logs mythos-1b --follow",
        ),
        ("skypilot", "sky jobs queue", "sky jobs logs --name mythos-1b"),
        ("slurm", "squeue --me --name mythos-1b", None),
        ("serve_gke", "kubectl get deployments,pods -l app=mythos-1b", "kubectl logs -f --tail 100 -l app=mythos-1b"),
    ],
)
def test_status_and_logs_of_the_job(launch, name, status, logs):
    settings = {"NAME": "mythos-1b", "IMAGE": "", "TOPOLOGY": ""}  # not asked for
    assert launch(name, "--status", CONFIG, **settings).calls[0].startswith(status)
    if logs is not None:
        assert launch(name, "--logs", CONFIG, **settings).calls[-1].startswith(logs)


@pytest.mark.parametrize("name", [*CLOUD, "slurm", "serve_gke", "local"])
@pytest.mark.parametrize("action", ["--status", "--logs"])
def test_a_look_that_fails_launches_nothing(launch, tmp_path, name, action):
    fails = dict.fromkeys(["kubectl", "gcluster", "gcloud", "sky", "squeue", *["tail"] * (name == "local")], "exit 3")
    done = launch(name, action, CONFIG, fakes=fails, SHARED=str(tmp_path))
    no_log = (name, action) == ("slurm", "--logs")  # in this folder
    assert done.returncode == (2 if no_log else 3)
    assert len(done.calls) == (0 if no_log else 1)


@pytest.mark.parametrize("name", ["gke", "local"])
@pytest.mark.parametrize("setting", ["SLICES", "RESTARTS", "GRACE"])
def test_settings_that_are_no_numbers(launch, name, setting):
    done = launch(name, CONFIG, **{setting: "many"})
    assert (done.returncode, done.stderr) == (2, f"{name}.sh: {setting}: got 'many', allowed: an integer\n")


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
        ({"TOPOLOGY": "v5e:2x2x1"}, "TOPOLOGY: got 'v5e:2x2x1', allowed: v5e:AxB"),
        ({"HOST_CHIPS": "8"}, "HOST_CHIPS: got '8', allowed for v5p:2x2x4"),
        ({"SPOT": "yes"}, "SPOT: got 'yes', allowed: 0 or 1"),
        ({"NAME": "My_run"}, "NAME: got 'My_run', allowed: at most 40 lower case letters"),
    ],
)
def test_a_wrong_setting_is_a_one_line_error(launch, settings, message):
    done = launch("gke", CONFIG, **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.calls == []


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
