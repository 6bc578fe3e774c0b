"""launch/tpu_vm.sh, whose commands for the workers run here, with stand-ins for gcloud and docker.

`slice` holds the state of the queued resource, `container` the exit code of the container that `codes` gives it,
`running` whether it runs. `drops` counts the connections to come that break, `offline` the questions that Google does
not get.
"""

import pytest

from tests.launch.conftest import CONFIG

GCLOUD = r"""
last() { local n; n=$(cat "$1" 2>/dev/null || echo 0); [ "$n" -gt 0 ] && echo $((n - 1)) > "$1"; }
case "$*" in
*describe*)
    if last offline; then echo "ERROR: Unable to connect" >&2; exit 1; fi
    [ -e slice ] || { echo "ERROR: NOT_FOUND: resource" >&2; exit 1; }
    cat slice ;;
*create*) echo ACTIVE > slice ;;
*delete*) rm -f slice container running ;;
*ssh*)
    [ "$(cat slice 2>/dev/null)" = ACTIVE ] || exit 255
    case "$*" in *"docker logs"*) last drops && exit 255 ;; esac
    bash -c "${!#}" ;;
esac
"""
DOCKER = r"""
case $1 in
run)
    [ ! -e container ] || exit 125
    head -n 1 codes > container; sed -i 1d codes; touch running ;;
inspect) [ -e container ] || exit 1; [ -e running ] && echo true || echo false ;;
logs) [ -e container ] || exit 1; echo "the log" ;;
wait)
    [ -e container ] || exit 1
    rm -f running
    if [ "$(cat container)" = preempted ]; then echo SUSPENDED > slice; rm container; exit 1; fi
    cat container ;;
rm) rm -f container running ;;
esac
"""
FAKES = {"gcloud": GCLOUD, "docker": DOCKER, "sudo": 'exec "$@"', "timeout": 'shift; exec "$@"'}


@pytest.fixture
def tpu_vm(launch, tmp_path):
    def run(codes, *words, **settings):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        return launch("tpu_vm", *words, CONFIG, fakes=FAKES, **{"SLICES": "1", **settings})

    return run


def count(done, command, words=""):
    return sum(call.startswith(command) and words in call for call in done.calls)


@pytest.mark.parametrize(
    ("codes", "end", "runs", "creates"),
    [
        ([137, 0], 0, 2, 1),
        ([42, 1, 0], 1, 2, 1),
        ([42, 42, 0], 42, 2, 1),
        # Preempted more often than the one restart that is allowed.
        (["preempted", "preempted", 42, 0], 0, 4, 3),
    ],
)
def test_restarts_after_42_up_to_the_limit_and_after_each_preemption(tpu_vm, codes, end, runs, creates):
    done = tpu_vm(codes, RESTARTS="1")
    assert done.returncode == end, done.stderr
    assert count(done, "docker run") == runs
    assert count(done, "gcloud", "queued-resources create") == creates
    assert "queued-resources delete" in done.calls[-1]
    assert "the log" in done.stderr


def test_a_lost_connection_leaves_the_run_alone(tpu_vm, tmp_path):
    (tmp_path / "drops").write_text("3")
    (tmp_path / "offline").write_text("0")
    done = tpu_vm([0])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no connection to mythos-1b, where the run goes on") == 3
    assert count(done, "docker run") == 1
    assert count(done, "docker rm --force") == 0
    assert count(done, "gcloud", "queued-resources create") == 1


def test_a_laptop_without_network_does_not_take_the_slice_for_preempted(tpu_vm, tmp_path):
    (tmp_path / "slice").write_text("ACTIVE\n")
    (tmp_path / "drops").write_text("2")
    (tmp_path / "offline").write_text("3")
    done = tpu_vm([0])
    assert done.returncode == 0, done.stderr
    assert count(done, "docker run") == 1
    assert count(done, "gcloud", "queued-resources create") == 0


def test_started_again_it_joins_a_run_that_is_there(tpu_vm, tmp_path):
    (tmp_path / "slice").write_text("ACTIVE\n")
    (tmp_path / "container").write_text("0\n")
    (tmp_path / "running").touch()
    done = tpu_vm([])
    assert done.returncode == 0, done.stderr
    assert "a run is there, which this script joins" in done.stdout
    assert count(done, "docker run") == 0


def test_several_slices_are_requested_together(tpu_vm):
    done = tpu_vm(["preempted", 0], "--dry-run", SLICES="2")
    assert "'--node-count' '2' '--node-prefix' 'mythos-1b' '--spot' '--accelerator-type' 'v5p-32'" in done.stdout
    assert done.stdout.count("docker run --detach") == 2


def test_status_and_logs(tpu_vm, tmp_path):
    (tmp_path / "slice").write_text("ACTIVE\n")
    (tmp_path / "container").write_text("0\n")
    shown = tpu_vm([], "--status").stdout
    assert "ACTIVE" in shown
    assert tpu_vm([], "--logs").stdout.endswith("the log\n")
