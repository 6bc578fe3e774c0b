"""Stored tables of RoPE, which are recomputed here: are they those that the config asks for?"""

from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError
from mythos_jax.model.layers import rope_frequencies

MOST_POSITIONS = 4096  # that are compared: half of them the first ones, half the last
# Of a frequency computed in float32: the exponent, the power and the product with a position are rounded.
FREQUENCY_ERROR = 2.0**-19
BASES = (1e4, 5e4, 1e5, 5e5, 1e6)  # tried if a table is not precise enough to tell its base
# Tables that OpenMythos stores but does not use, by the attention of the model.
UNUSED = {"gqa": "freqs_cis_mla", "mla": "freqs_cis"}

Part = tuple[str, np.ndarray]  # "cos", "sin" [T, K / 2] of the positions, or "frequency" [1, K / 2]


def compare_table(name: str, table: np.ndarray, config: ModelConfig) -> str | None:
    """None if the stored table is what its config asks for; a line if it is that, rounded to its dtype.

    Raises ConfigError if it is another table, with its base if that can be told.
    """
    if UNUSED[config.attention] == name:
        return None
    dtype = np.dtype(np.float32) if table.dtype.kind == "c" else table.dtype
    width = config.rope_dim // 2
    positions = _positions(name, table, width)
    parts = list(_parts(name, table, width, positions))
    if not parts or (dtype.kind != "f" and dtype.name != "bfloat16"):
        shape = list(table.shape)
        raise ConfigError(f"{name}: shape {shape}, dtype {table.dtype}, not a table of RoPE over {2 * width} channels")
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2
    # Code that scales frequencies may store them before or after that.
    configs = [config] if config.rope_scaling == "none" else [replace(config, rope_scaling="none"), config]
    fits = False
    for scaled in configs:
        largest, fits = _difference(parts, positions, scaled, rounding)
        if fits:
            break
    if fits and len(parts) == 1 and parts[0][0] == "cos" and name.startswith("freqs_cis"):
        return f"{name}: has no sines, which a cast to a real dtype takes out of it; RoPE is computed here with both"
    if fits:
        said = f"{name}: stored in {dtype}, computed here in float32; the largest difference is {largest:.1e}"
        return f"{said}; code that reads the stored one gives slightly different logits" if rounding > 1e-6 else None
    for base in _bases(parts):
        if any(_difference(parts, positions, replace(c, rope_theta=base), rounding)[1] for c in configs):
            raise ConfigError(
                f"{name}: is the table of RoPE base {base:g}, allowed: the config's {config.rope_theta:g}; if the "
                "table is right, correct the config"
            )
    raise ConfigError(
        f"{name}: differs by {largest:.1e} from the table of the config's RoPE base {config.rope_theta:g}, allowed: "
        "that table"
    )


def _positions(name: str, table: np.ndarray, width: int) -> np.ndarray:
    """The positions of the table that are compared."""
    both_halves = name.endswith(("cos_cached", "sin_cached"))
    per_position = width if table.dtype.kind == "c" or (table.ndim == 2 and not both_halves) else 2 * width
    count = table.size // per_position
    half = MOST_POSITIONS // 2
    return np.arange(count) if count <= MOST_POSITIONS else np.r_[:half, count - half : count]


def _parts(name: str, table: np.ndarray, width: int, positions: np.ndarray) -> Iterator[Part]:
    """What the table holds at these positions; nothing if it does not have a shape that is known."""
    if name.endswith("inv_freq"):
        if table.shape == (width,):
            yield "frequency", table.astype(np.float64)[None]
    elif name.endswith(("cos_cached", "sin_cached")):  # of each channel, both halves of a head alike
        if table.shape[-1:] == (2 * width,):
            yield name[-len("cos_cached") :][:3], table.reshape(-1, 2 * width)[positions, :width].astype(np.float64)
    elif table.dtype.kind == "c" and table.shape[-1:] == (width,):
        rows = table.reshape(-1, width)[positions]
        yield from [("cos", rows.real.astype(np.float64)), ("sin", rows.imag.astype(np.float64))]
    elif table.ndim > 2 and table.shape[-2:] == (width, 2):
        rows = table.reshape(-1, width, 2)[positions].astype(np.float64)
        yield from [("cos", rows[..., 0]), ("sin", rows[..., 1])]
    elif table.ndim == 2 and table.shape[-1] == width:
        yield "cos", table[positions].astype(np.float64)


def _difference(parts: list[Part], positions: np.ndarray, config: ModelConfig, rounding: float) -> tuple[float, bool]:
    """The largest difference to the table of this config, and whether all of them are those of rounding."""
    frequencies = np.asarray(rope_frequencies(config), np.float64)
    angles = positions[:, None] * frequencies
    largest, fits = 0.0, True
    for kind, stored in parts:
        if kind == "frequency":
            expected, slack = frequencies[None], FREQUENCY_ERROR * frequencies
        else:
            expected, slack = (np.cos if kind == "cos" else np.sin)(angles), FREQUENCY_ERROR * angles
        difference = np.abs(stored - expected)
        largest = max(largest, float(difference.max(initial=0)))
        fits = fits and bool((difference <= slack + 1.01 * rounding * np.abs(expected) + 1e-6).all())
    return largest, fits


def _bases(parts: list[Part]) -> Iterator[float]:
    """Bases that the table may be of: the one of its second channel at position 1, then the usual ones."""
    kind, stored = parts[-1]
    row = stored[0 if kind == "frequency" else 1 : 2]
    if row.size > 1:
        value = float(np.clip(row[0, 1], -1, 1))
        frequency = {"frequency": value, "sin": np.arcsin(value), "cos": np.arccos(value)}[kind]
        if 0 < frequency < 1:
            base = float(frequency) ** -row.shape[1]
            yield from (float(f"{base:.{digits}g}") for digits in (3, 6))
    yield from BASES
