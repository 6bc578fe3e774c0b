"""Half the parameters: looped models against plain transformers of several sizes, trained on the same bytes.

    .venv/bin/python -m benchmarks.science.rates            # first: the learning rates
    .venv/bin/python -m benchmarks.science.parameters [--size gpu] [--seeds 0 1 2] [--finished]

Prints each model's cost and loss; then what a plain transformer of equal loss costs, in multiples of the looped model's
cost. It is interpolated on the frontier of the plain ones: the lowest loss up to each cost. Then the exponent phi of
"a loop is worth r^phi layers": at the width that the looped models share, p + c + n r^phi layers of a plain transformer
have the loss of a looped model with p layers before the loop, c after it, and n layers in r loops (arXiv 2604.21106).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.drawing import panels, save, tidy
from benchmarks.science.frame import (
    Arm,
    Rows,
    bracket,
    folder,
    interval,
    losses,
    parser_of,
    run_arms,
    save_json,
    spread,
)
from mythos_jax.flops import forward_flops

PLAIN = (Arm(3, 3), Arm(4, 2), Arm(4, 3), Arm(4, 4), Arm(4, 8), Arm(6, 3))
LOOPED = (Arm(4, 1, loops=2), Arm(4, 1, loops=4), Arm(4, 1, loops=8), Arm(4, 2, loops=4), Arm(4, 1, loops=4, experts=4))
COSTS = ("parameters without embedding", "parameters", "training FLOPs", "FLOPs per generated token")
PHIS = np.linspace(-1, 1.5, 2501)


def costs(arm: Arm, size: str, run: dict[str, float]) -> np.ndarray:
    """In the order of COSTS. A generated token attends to half a row on average."""
    config = arm.config(size)
    token = forward_flops(config.model, config.data.seq_len // 2).at(config.model.loops)
    return np.array([run["non_embedding"], run["parameters"], run["training_flops"], token])


def cost_at(loss: float, plain_costs: np.ndarray, plain_losses: np.ndarray) -> float:
    """The cost at which the frontier of the plain models reaches a loss: interpolated in its logarithm; the cheapest or
    the dearest if the loss is beyond them."""
    order = np.argsort(plain_costs)
    best = np.minimum.accumulate(plain_losses[order])
    frontier = np.concatenate([[True], best[1:] < best[:-1]])
    xs, ys = np.log(plain_costs[order][frontier]), best[frontier]
    return float(np.exp(np.interp(-loss, -ys, xs)))


def fitted_phi(plain: dict[int, float], looped: Sequence[tuple[Arm, float]]) -> float:
    """The phi with the least squared error. plain: layers -> loss, at the width of the looped models."""
    layers = sorted(plain)
    errors = np.zeros_like(PHIS)
    for arm, loss in looped:
        worth = np.log(2 + arm.core * arm.loops**PHIS)
        errors += (np.interp(worth, np.log(layers), [plain[n] for n in layers]) - loss) ** 2
    return float(PHIS[errors.argmin()])


class Comparison:
    """The finished runs of the arms, those with all seeds of the first one."""

    def __init__(self, rows: Rows, size: str) -> None:
        self.seeds = max(len(runs) for runs in rows.values())
        whole = [arm for arm in (*PLAIN, *LOOPED) if len(rows.get(arm.name(size), ())) == self.seeds]
        self.size, self.rows, self.arms = size, rows, whole
        self.losses = {arm: losses(rows[arm.name(size)], max(arm.loops, 1)) for arm in whole}
        self.costs = {arm: costs(arm, size, rows[arm.name(size)][0]) for arm in whole}
        self.plain = [arm for arm in whole if not arm.loops]
        self.looped = [arm for arm in whole if arm.loops]
        self.dense = [arm for arm in self.looped if not arm.experts]

    def ratio(self, arm: Arm, cost: int) -> Callable[[list[int]], float]:
        """What a plain model of equal loss costs, in multiples of the arm's cost; of these seeds."""
        plain_costs = np.array([self.costs[p][cost] for p in self.plain])

        def of(seeds: list[int]) -> float:
            plain_losses = np.array([self.losses[p][seeds].mean() for p in self.plain])
            return cost_at(self.losses[arm][seeds].mean(), plain_costs, plain_losses) / self.costs[arm][cost]

        return of

    def beats(self, arm: Arm, plain: Sequence[Arm]) -> bool:
        """Whether an arm is better than all these, so that what is interpolated between them is a bound."""
        return bool(self.losses[arm].mean() < min(self.losses[p].mean() for p in plain))

    @property
    def layers(self) -> dict[int, Arm]:
        """The plain models of the width of the looped ones, by their layers; none if too few have finished."""
        width = {arm.width for arm in self.dense}
        found = {arm.core: arm for arm in self.plain if arm.width in width}
        return found if len(found) > 1 else {}

    def phi(self, seeds: list[int]) -> float:
        plain = {layers: self.losses[arm][seeds].mean() for layers, arm in self.layers.items()}
        return fitted_phi(plain, [(arm, self.losses[arm][seeds].mean()) for arm in self.dense])


def tables(found: Comparison) -> list[str]:
    lines = [f"| model | layers run | {' | '.join(COSTS)} | nats per byte |", "|---" * 7 + "|"]
    for arm in found.arms:
        numbers = " | ".join(f"{cost:.4g}" if cost < 1e7 else f"{cost:.3g}" for cost in found.costs[arm])
        lines.append(f"| {arm.name(found.size)} | {arm.executed} | {numbers} | {spread(found.losses[arm])} |")
    lines += ["", f"| plain of equal loss costs, times | {' | '.join(COSTS)} |", "|---" * 5 + "|"]
    for arm in found.looped if found.plain else ():
        cells = [bracket(interval(found.seeds, found.ratio(arm, i))) for i in range(len(COSTS))]
        bound = "at least " if found.beats(arm, found.plain) else ""
        lines.append(f"| {arm.name(found.size)} | {' | '.join(bound + cell for cell in cells)} |")
    if found.layers:
        bound = "at least " if any(found.beats(arm, [*found.layers.values()]) for arm in found.dense) else ""
        lines += ["", f"phi: {bound}{bracket(interval(found.seeds, found.phi))}, {found.seeds} seeds"]
    return lines


def draw(found: Comparison, path: Path) -> None:
    figure, axes = panels(3, share=True)
    marks = dict(zip(found.looped, "ov^D*", strict=False))
    for panel, cost in zip(axes, (0, 2, 3), strict=True):
        for arm in found.arms:
            values, x, name = found.losses[arm], found.costs[arm][cost], arm.name(found.size).removesuffix(" layers")
            middle = values.mean()
            if arm.loops:  # side by side where their costs are equal
                x *= 1 + 0.025 * (found.looped.index(arm) - 1)
            else:
                panel.annotate(name.removeprefix("plain "), (x, middle), (5, 5), textcoords="offset points", fontsize=8)
            bars = [[middle - values.min()], [values.max() - middle]]
            look = {"fmt": marks[arm], "label": name} if arm.loops else {"fmt": "s", "color": "0.4"}
            panel.errorbar([x], [middle], bars, capsize=2, **look)
        panel.set(xscale="log", xlabel=COSTS[cost])
        tidy(panel)
    axes[0].set_ylabel("held-out nats per byte (grey: plain)")
    save(figure, path)


def main(words: list[str] | None = None) -> None:
    arguments = parser_of(__doc__).parse_args(words)
    rows = run_arms(arguments, (*PLAIN, *LOOPED))
    found = Comparison(rows, arguments.size)
    print("\n".join(tables(found)))
    save_json(arguments, "parameters", rows)
    draw(found, folder(arguments) / "parameters.png")


if __name__ == "__main__":
    main()
