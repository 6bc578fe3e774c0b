"""The base of a LoRA run: its weights are in no checkpoint, so a run remembers which they were."""

from collections.abc import Mapping
from typing import Any

from mythos_jax.errors import ConfigError
from mythos_jax.runs.fingerprint import fingerprint


def base_record(path: str, variables: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint stores about the frozen weights: where they came from, and a fingerprint of them as stored."""
    return {"path": path, "fingerprint": fingerprint(variables)}


def check_base(saved: Mapping[str, Any], current: Mapping[str, str], directory: Any, flag: str) -> None:
    """Raises ConfigError if the low-rank weights of a checkpoint belong to other weights than those that are here.

    saved: the meta of the checkpoint. current: a `base_record`. flag: says where the weights are.
    """
    if saved["base"]["fingerprint"] != current["fingerprint"]:
        raise ConfigError(
            f"{directory}: its low-rank weights do not belong to the weights of {current['path']}; allowed: those of "
            f"{saved['base']['path']} when the run began ({flag} MODEL says where they are now)"
        )
