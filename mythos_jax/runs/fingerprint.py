"""A short text that tells whether weights are the same, wherever they are and however a mesh divides them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SALTS = (0x9E3779B9, 0x85EBCA6B)


def fingerprint(variables: Mapping[str, Any]) -> str:
    """64 hexadecimal digits: a hash of the names, shapes, dtypes and bits of all arrays.

    Each device adds up hashes of its own elements, modulo 2^32, so that no array moves, and the order does not matter.
    (The checksums of checkpoints are sums of the elements themselves, which not every change of many elements moves.)
    """
    flat = flatten_dict(dict(variables), sep=".")
    sums = jax.device_get({path: _sums(array) for path, array in flat.items()})
    lines = [f"{path} {flat[path].shape} {flat[path].dtype} {sums[path].tolist()}" for path in sorted(flat)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """uint32 [2]: sums of two hashes of every element's bits and index."""
    bits, index = bits_and_index(x)
    return jnp.stack([_mixed(bits ^ (index * jnp.uint32(salt))).sum(dtype=jnp.uint32) for salt in _SALTS])


def bits_and_index(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """uint32, shaped like x: the bits of each element, and its position, modulo 2^32, in the order of the axes."""
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return bits, index


def _mixed(h: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which every bit of the result depends on every bit (lowbias32 of Chris Wellons)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = (h ^ (h >> 15)) * jnp.uint32(0x846CA68B)
    return h ^ (h >> 16)
