"""Which layers of a dense model become the prelude, the loop and the coda of a looped one."""

from collections.abc import Sequence
from dataclasses import dataclass

from mythos_jax.config import ModelConfig
from mythos_jax.errors import ConfigError

Layers = tuple[int, ...]  # numbered from 0, in the order in which the dense model applies them
PARTS = ("prelude", "loop", "coda")
LOOP = "recurrence.cell."


@dataclass(frozen=True)
class Cut:
    """The layers of each part, in order. Layers in none of them are dropped."""

    prelude: Layers
    loop: Layers
    coda: Layers

    @property
    def kept(self) -> Layers:
        return self.prelude + self.loop + self.coda

    def dropped(self, layers: int) -> Layers:
        return tuple(i for i in range(layers) if i not in self.kept)

    def sources(self) -> dict[str, int]:
        """The dense layer that each layer of the looped model is, by the path of the latter."""
        return {path: layer for layers in self._places().values() for path, layer in layers.items()}

    def part_of(self, path: str) -> str:
        """The part that a layer of the looped model is in."""
        return next(part for part, layers in self._places().items() if path in layers)

    def _places(self) -> dict[str, dict[str, int]]:
        return {
            "prelude": {f"prelude_{i}": layer for i, layer in enumerate(self.prelude)},
            "loop": {f"{LOOP}layer_{i}": layer for i, layer in enumerate(self.loop)},
            "coda": {f"coda_{i}": layer for i, layer in enumerate(self.coda)},
        }


def dense_layers(config: ModelConfig) -> list[str]:
    """The path of each layer, in the order in which one pass applies them."""
    return [
        *(f"prelude_{i}" for i in range(config.prelude_layers)),
        *(f"{LOOP}layer_{i}" for i in range(config.loop_layers)),
        *(f"coda_{i}" for i in range(config.coda_layers)),
    ]


def make_cut(layers: int, prelude: Layers | None = None, loop: Layers | None = None, coda: Layers | None = None) -> Cut:
    """The cut of a model of this many layers. Without a `loop`, the middle half of the layers that the other parts
    leave; without a prelude or a coda, all layers before or after the loop.

    Raises ConfigError: a layer that the model does not have, parts that overlap or are not in order, an empty loop.
    """
    for name, part in zip(PARTS, (prelude, loop, coda), strict=True):
        for layer in part or ():
            if not 0 <= layer < layers:
                raise ConfigError(f"--{name}: got layer {layer}, allowed: 0 to {layers - 1}, the layers of the model")
    if loop is None:
        first = layers // 4 if prelude is None else max(prelude, default=-1) + 1
        end = layers - layers // 4 if coda is None else min(coda, default=layers)
        loop = tuple(range(first, end))
    if not loop:
        raise ConfigError("--loop: got no layer, allowed: at least one that is neither in the prelude nor in the coda")
    prelude = tuple(range(min(loop))) if prelude is None else prelude
    coda = tuple(range(max(loop) + 1, layers)) if coda is None else coda
    _check_order(Cut(prelude, loop, coda))
    return Cut(prelude, loop, coda)


def _check_order(cut: Cut) -> None:
    """A layer may be in one place only, and layers keep their order: what they were trained to receive."""
    placed: list[tuple[str, int]] = []
    for name, part in zip(PARTS, (cut.prelude, cut.loop, cut.coda), strict=True):
        for layer in part:
            earlier, latest = placed[-1] if placed else ("", -1)
            if layer <= latest:
                taken = next((where for where, other in placed if other == layer), None)
                problem = f"in the {taken} already" if taken else f"before layer {latest} in the {earlier}"
                allowed = "each layer once, prelude before loop before coda"
                raise ConfigError(f"--{name}: got layer {layer}, which is {problem}; allowed: {allowed}")
            placed.append((name, layer))


def describe(layers: Sequence[int]) -> str:
    """0-3,6: the layers as a user names them; "none" if there are none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
