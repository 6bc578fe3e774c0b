"""`mythos launch`: checks the config as `mythos train` would, then becomes the script of launch/ for the target."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mythos_jax
from mythos_jax.bounds import PositiveInt
from mythos_jax.commands.arguments import of_type, path
from mythos_jax.errors import ConfigError
from mythos_jax.streams import log, say

SUMMARY = "Start a training run on a cluster, or show the state or the log of one. Any config field can be set."

# In the repository a link to launch/, which is where they are edited; in a wheel a folder.
FOLDER = Path(mythos_jax.__file__).parent / "launch"
TARGETS = ("gke", "gcluster", "tpu-vm", "slurm", "skypilot", "local")
TPU_TARGETS = ("gke", "gcluster", "tpu-vm")


@dataclass(frozen=True)
class Setting:
    """A flag that sets a variable of the scripts; without the flag, the variable is as in the environment.

    targets: those whose script reads it. numbers: whether it is an integer >= 1.
    """

    flag: str
    metavar: str
    help: str
    targets: tuple[str, ...] = TARGETS
    numbers: bool = False

    @property
    def variable(self) -> str:
        return self.flag.upper().replace("-", "_")


SETTINGS = (
    Setting("topology", "CHIP:SHAPE", "the TPU slice, such as v6e:4x4; elsewhere, one to compare with"),
    Setting("slices", "N", "slices, connected by the data centre network (default 1)", TPU_TARGETS, numbers=True),
    Setting("host-chips", "N", "chips per host: 1 for 1x1, 4 or 8 (the default) for 2x4, else 4", TPU_TARGETS, True),
    Setting("image", "IMAGE", "the container image, made from launch/Dockerfile.tpu and pushed", TPU_TARGETS),
    Setting("bucket", "gs://…", "where the run and compiled programs are stored", (*TPU_TARGETS, "slurm", "skypilot")),
    Setting("shared", "DIR", "the same as a folder that all nodes see (default: the current one)", ("slurm", "local")),
    Setting("name", "NAME", "of the job and of its run directory (default: that of the config)"),
    Setting("restarts", "N", "maximum restarts after exit code 42 or a killed process (default 20)", numbers=True),
    Setting("grace", "S", "seconds between SIGTERM and SIGKILL, for the last save (default 180)", numbers=True),
    Setting("spot", "0|1", "1: spot capacity (default: 1 for tpu-vm and skypilot)", (*TPU_TARGETS, "skypilot")),
    Setting("priority", "NAME", "a PriorityClass of the cluster", ("gke", "gcluster")),
    Setting("account", "NAME", "a Kubernetes service account, which may write to the bucket", ("gke", "gcluster")),
    Setting("host-network", "0|1", "1 (the default without --account): pods in the host's network", ("gke",)),
    Setting("queue", "NAME", "Kueue's LocalQueue (default multislice-queue)", ("gke",)),
    Setting("cluster", "NAME", "the GKE cluster", ("gcluster",)),
    Setting("location", "PLACE", "its region or zone", ("gcluster",)),
    Setting("zone", "ZONE", "of the TPU VMs", ("tpu-vm",)),
    Setting("project", "ID", "the Google Cloud project (default: gcloud's)", ("gcluster", "tpu-vm")),
    Setting("runtime", "VERSION", "the image of the VMs (default: that of the generation)", ("tpu-vm",)),
    Setting("keep", "0|1", "1: keep the slices when the run has ended", ("tpu-vm",)),
    Setting("nodes", "N", "nodes (default 1; skypilot: 2)", ("slurm", "skypilot"), numbers=True),
    Setting("tasks", "N", "processes per node (default 1, which has all its GPUs)", ("slurm",), numbers=True),
    Setting("gpus", "N", "GPUs per node (slurm: default 8, 0: none; skypilot: default H100:8)", ("slurm", "skypilot")),
    Setting("processes", "N", "processes (default 2)", ("local",), numbers=True),
    Setting("devices", "N", "CPU devices per process (default 4)", ("local",), numbers=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("config", type=path, metavar="CONFIG", help="as for `mythos train`")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="print what would be run or applied, and change nothing")
    action.add_argument("--status", action="store_true", help="show the state of the job that this command launches")
    action.add_argument("--logs", action="store_true", help="show the log of that job, and what is added to it")
    parser.add_argument("--no-preflight", action="store_true", help="do not compile the train step first")
    group = parser.add_argument_group(
        "settings", "each is also an environment variable, such as HOST_CHIPS; see launch/README.md"
    )
    for setting in SETTINGS:
        where = "" if setting.targets == TARGETS else f" ({', '.join(setting.targets)})"
        text = path if setting.metavar == "DIR" else str
        group.add_argument(
            f"--{setting.flag}",
            type=of_type(PositiveInt) if setting.numbers else text,
            metavar=setting.metavar,
            help=setting.help + where,
        )
    parser.set_defaults(takes_overrides=True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    script = FOLDER / f"{arguments.target.replace('-', '_')}.sh"
    if not script.is_file():
        raise ConfigError(f"{script}: not found; allowed: a checkout of mythos_jax, or its wheel")
    chosen = _chosen(arguments)
    environment = {**os.environ, **chosen}
    action = next((f"--{name}" for name in ("status", "logs") if getattr(arguments, name)), "")
    if not action:
        _check(arguments.config, overrides, arguments.target, environment)
        action = "--dry-run" if arguments.dry_run else ""
    if arguments.no_preflight:
        environment["PREFLIGHT"] = "0"
    environment.setdefault("PYTHON", sys.executable)
    ours = Path(sys.executable).parent / "mythos"
    if ours.exists():
        environment.setdefault("MYTHOS", str(ours))
    words = ["bash", str(script), *([action] if action else []), arguments.config, *overrides]
    shown = "".join(f"{name}={shlex.quote(value)} " for name, value in chosen.items())
    say(f"mythos: runs {shown}launch/{script.name} {shlex.join(words[2:])}")
    sys.stdout.flush()
    os.execvpe("bash", words, environment)  # signals, the terminal and the exit code are the script's


def _chosen(arguments: argparse.Namespace) -> dict[str, str]:
    """The variables that flags set. Raises ConfigError for a flag that the target does not know."""
    chosen = {}
    for setting in SETTINGS:
        value = getattr(arguments, setting.flag.replace("-", "_"))
        if value is None:
            continue
        if arguments.target not in setting.targets:
            known = ", ".join(f"--{other.flag}" for other in SETTINGS if arguments.target in other.targets)
            raise ConfigError(f"--{setting.flag}: not a setting of {arguments.target}; allowed: {known}")
        chosen[setting.variable] = str(value)
    return chosen


def _check(config: str, overrides: list[str], target: str, environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a config that `mythos train` would refuse on the devices of the target."""
    count = _devices(target, environment)  # names of slices are wrong more often than configs, and need no jax
    # This machine's own accelerator stays free.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jax.sharding import AbstractMesh

    from mythos_jax.config.named import named_config
    from mythos_jax.runs.configs import load_config
    from mythos_jax.sharding import axis_sizes
    from mythos_jax.training.start import check_on_mesh

    loaded = load_config(config, overrides)
    if target in TPU_TARGETS and loaded.mesh.slices != (slices := _number(environment, "SLICES", 1)):
        raise ConfigError(f"mesh.slices: got {loaded.mesh.slices}, allowed: {slices}, the number of --slices")
    sizes = axis_sizes(loaded.mesh, count)
    check_on_mesh(loaded, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    if target in TPU_TARGETS and named_config(config) is None and not config.startswith("configs/"):
        log(f"{config} is read inside the image, at the same path below /opt/mythos; images have configs/ alone")


def _devices(target: str, environment: Mapping[str, str]) -> int:
    """How many devices the run will have. Raises ConfigError for a slice that does not exist."""
    number = partial(_number, environment)
    if target in TPU_TARGETS:
        from mythos_jax.preflight.topology import parse_topology

        topology = parse_topology(environment.get("TOPOLOGY", ""), number("SLICES", 1))
        if topology.chip.is_gpu:
            raise ConfigError(f"--topology: got {topology.name}, allowed for {target}: a slice of TPUs")
        return topology.chips
    if target == "local":
        return number("PROCESSES", 2) * number("DEVICES", 4)
    if target == "slurm":
        nodes, gpus = number("NODES", 1), number("GPUS", 8, least=0)
        return nodes * (gpus or number("TASKS", 1))
    kind, _, gpus_text = (environment.get("GPUS") or "H100:8").rpartition(":")
    if not kind or not re.fullmatch(r"[1-9]\d{0,5}", gpus_text):
        raise ConfigError(f"--gpus: got {environment.get('GPUS')!r}, allowed: a kind and a number, such as H100:8")
    return number("NODES", 2) * int(gpus_text)


def _number(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    """The variable of the scripts. Raises ConfigError if it is not an integer from `least` on."""
    text = environment.get(name) or str(default)
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < least:
        raise ConfigError(f"{name}: got {text!r}, allowed: an integer >= {least}")
    return int(text)
