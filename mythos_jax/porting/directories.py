"""Which files of a directory hold its model's tensors: those of Hugging Face, of other trainers, of DeepSpeed."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

from mythos_jax.errors import ConfigError
from mythos_jax.paths import read_json
from mythos_jax.porting.dcp import METADATA

# In order of preference; the first that a directory has is read.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.pt",
    "model.pth",
)
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")  # in order of preference
# Files with such names are parts of a trainer's state, not weights; the first is of our own format (origin.py).
NOT_WEIGHTS = (
    "source_buffers",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_state",
    "training_args",
    "sampler",
    "meta.pt",
)

DEEPSPEED_STATE = "mp_rank_*_model_states.pt"  # all weights, if they are not divided (ZeRO stages 0, 1 and 2)
DEEPSPEED_PART = "zero_pp_rank_*_model_states.pt"  # of stage 3, whose weights are in the optimizer's files


def files_of(path: Path, notes: list[str]) -> list[Path]:
    """The files with the tensors of a directory, of an index, or the file itself. Raises ConfigError for one that holds
    a part of a model only."""
    if path.is_dir():
        return _weight_files(path, notes)
    if path.name.endswith(INDEX):
        return _shards(path)
    if fnmatchcase(path.name, DEEPSPEED_PART):
        raise _divided(path, path.parent)
    if path.suffix == ".distcp" or path.name == METADATA:
        raise ConfigError(f"{path}: is a part of a distributed checkpoint, allowed: its directory, {path.parent}")
    return [path]


def _weight_files(directory: Path, notes: list[str]) -> list[Path]:
    """The files that hold a directory's tensors; the directory of `.metadata` for torch.distributed.checkpoint.

    Adds a line to `notes` if there are others. Raises ConfigError if there are none, or several candidates.
    """
    candidates = [path for path in sorted(directory.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    candidates = [path for path in candidates if not _is_trainers(path.name)]
    for name in WEIGHT_FILES:
        path = directory / name
        if path.is_file():
            files = _shards(path) if name.endswith(INDEX) else [path]
            _note_others(directory, name, [other for other in candidates if other not in files], notes)
            return files
    if not candidates:
        return _deepspeed(directory, notes) or _distributed(directory) or _none(directory)
    preferred = sorted(candidates, key=lambda path: SUFFIXES.index(path.suffix))
    if len({path.stem for path in candidates}) > 1 or len({path.suffix for path in candidates}) < len(candidates):
        got = ", ".join(path.name for path in candidates)
        raise ConfigError(f"{directory}: got weight files: {got}, allowed: one of them (name it), or an index")
    _note_others(directory, preferred[0].name, preferred[1:], notes)
    return preferred[:1]


def _is_trainers(name: str) -> bool:
    return name.startswith(NOT_WEIGHTS) or name.endswith(("_optim_states.pt", "_model_states.pt"))


def _note_others(directory: Path, name: str, others: list[Path], notes: list[str]) -> None:
    if others:
        notes.append(f"{directory}: read: {name}; left: {', '.join(path.name for path in others)}")


def _shards(index_path: Path) -> list[Path]:
    """The files that an index names."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ConfigError(f"{index_path}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # An index must not name files anywhere else on the disk.
        is_inside = not PurePosixPath(name).is_absolute() and not PureWindowsPath(name).anchor and "\\" not in name
        if not is_inside or not name or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"{index_path}: got shard {name!r}, allowed: names of files in the same directory")
        if not (index_path.parent / name).is_file():
            raise ConfigError(f"{index_path}: names shard {name}, which is missing")
    return sorted({index_path.parent / name for name in names})


def _deepspeed(directory: Path, notes: list[str]) -> list[Path]:
    """The file of DeepSpeed's engine, in the directory itself or in the one that `latest` names."""
    for folder in (directory, *_deepspeed_folders(directory)):
        parts = sorted(folder.glob(DEEPSPEED_PART))
        states = sorted(folder.glob(DEEPSPEED_STATE))
        if parts or len(states) > 1:
            raise _divided((parts or states)[0], folder)
        if states:
            notes.append(
                f"{states[0]}: the weights that the model computed with; float32 ones, if the optimizer has them, are "
                "written by zero_to_fp32.py next to it"
            )
            return states
    return []


def _divided(part: Path, folder: Path) -> ConfigError:
    """The error for weights of which each process wrote a part. folder: the one of a step."""
    where = folder if (folder / "zero_to_fp32.py").is_file() else folder.parent
    command = f"python {where}/zero_to_fp32.py {where} OUT"
    return ConfigError(f"{part}: holds the part of one process of divided weights, allowed: whole ones: {command}")


def _deepspeed_folders(directory: Path) -> list[Path]:
    latest = directory / "latest"
    if latest.is_file() and latest.stat().st_size < 1000:
        name = latest.read_text(encoding="utf-8", errors="replace").strip()
        if name and Path(name).name == name and (directory / name).is_dir():
            return [directory / name]
    folders = sorted(path for path in directory.glob("global_step*") if path.is_dir())
    if len(folders) > 1:
        got = ", ".join(path.name for path in folders)
        raise ConfigError(f"{directory}: got {got}, allowed: one of them (name it), or a file `latest` that does")
    return folders


def _distributed(directory: Path) -> list[Path]:
    """The directory that torch.distributed.checkpoint has written: this one, or the only one in it that is not an
    optimizer's."""
    if (directory / METADATA).is_file():
        return [directory]
    inner = [path for path in sorted(directory.iterdir()) if (path / METADATA).is_file()]
    inner = [path for path in inner if not _is_trainers(path.name)]
    if len(inner) > 1:
        raise ConfigError(f"{directory}: got {', '.join(path.name for path in inner)}, allowed: one of them (name it)")
    return inner


def _none(directory: Path) -> list[Path]:
    allowed = ", ".join(SUFFIXES[:-1])
    raise ConfigError(f"{directory}: got weight files: none, allowed: one {allowed} or {SUFFIXES[-1]}, or an index")
