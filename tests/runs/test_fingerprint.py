"""Fingerprints of weights: the same on every mesh, another one for any other bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mythos_jax.config import MeshConfig
from mythos_jax.runs.fingerprint import fingerprint
from mythos_jax.sharding import make_mesh

ONE, FOUR = make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])


def of(array, mesh=ONE, spec=(), name="w"):
    return fingerprint({"params": {name: jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))}})


def test_only_values_count():
    array = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    first = of(array)
    assert len(first) == 64
    assert of(array, FOUR, ("fsdp",)) == of(array, FOUR) == first
    changed = array.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], 1)
    swapped = array.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    others = [changed, swapped, array.T, array.reshape(4, 10), array.astype(jnp.bfloat16), -array, np.zeros((8, 5))]
    found = {first, *(of(other) for other in others), of(array, name="v")}
    assert len(found) == len(others) + 2
