"""The base of a LoRA run: its weights are in no checkpoint, so a run remembers which they were."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from mythos_jax.errors import ConfigError
from mythos_jax.runs.checkpoints import checksums


def base_record(path: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint stores about the frozen weights, as they are stored: where they came from, and a fingerprint."""
    return {"path": path, "fingerprint": fingerprint(variables)}


def fingerprint(variables: Mapping[str, Any]) -> str:
    """Tells weights apart by names, shapes, dtypes and values. It is the same on every mesh."""
    flat = dict(sorted(flatten_dict(dict(variables), sep=".").items()))
    shapes = [(name, list(x.shape), str(x.dtype)) for name, x in flat.items()]
    sums = jax.device_get(checksums(list(flat.values()))).tolist()
    return hashlib.sha256(json.dumps([shapes, sums]).encode()).hexdigest()


def check_base(saved: Mapping[str, Any], current: Mapping[str, str], directory: Any, flag: str) -> None:
    """Raises ConfigError if the low-rank weights of a checkpoint belong to other weights than those that are here.

    saved: the meta of the checkpoint. current: a `base_record`. flag: says where the weights are.
    """
    if saved["base"]["fingerprint"] != current["fingerprint"]:
        raise ConfigError(
            f"{directory}: its low-rank weights do not belong to the weights of {current['path']}; allowed: those of "
            f"{saved['base']['path']} when the run began ({flag} MODEL says where they are now)"
        )
