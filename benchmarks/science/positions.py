"""Depth that is needed: how many prefix products of a group a loop solves, by the number of loops in training.

    .venv/bin/python -m benchmarks.science.positions [--size gpu] [--seeds 0 1 2]

Trains configs/tasks/group.yaml on rows of N factors with several numbers of loops T, and evaluates each at several
loops. Position n counts as solved if the products of 1, 2, … n factors all are right in 90 % of the rows. To solve its
row, a model must solve N / T positions per loop; the exponent of what it does solve per loop, as a power of N / T, is 1
if models learn to be as fast as they have to (arXiv 2607.20594 finds 0.98). The speed is that up to the loops at which
90 % of all solved positions are.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.drawing import band, loops_axis, panels, save, tidy
from benchmarks.exact_match import SMOKE, Results, exact_match, run_arms
from benchmarks.science.frame import bracket, folder, interval, parser_of, save_json, spread

THRESHOLD = 90.0
# Length of the rows, numbers of loops in training, and overrides.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]] = {
    "cpu": (12, (3, 6, 12), ()),
    "gpu": (
        64,
        (4, 8, 16, 32, 64),
        (
            *("--data.task.group=A5", "--data.task.alphabet=60", "--model.vocab_size=64", "--model.max_seq_len=128"),
            *("--model.dim=256", "--model.hidden_dim=688", "--model.n_heads=8", "--model.n_kv_heads=8"),
            *("--training.steps=6000", "--training.batch_size=512", "--evaluation.batch_size=512"),
        ),
    ),
    "smoke": (4, (1, 2), SMOKE),
}


def overrides(size: str, loops: int) -> list[str]:
    """Of configs/tasks/group.yaml, for training with this many loops."""
    length, _, more = SIZES[size]
    evaluated = sorted({max(loops * quarters // 8, 1) for quarters in range(1, 9)} | {loops * 3 // 2, loops * 2})
    return [
        *(f"--model.loops={loops}", f"--data.task.difficulty=[{length}]", f"--data.seq_len={length + 1}"),
        f"--evaluation.difficulties={list(range(1, length + 1))}",
        f"--evaluation.loops={evaluated}",
        *more,
    ]


def solved(run: Results) -> dict[int, int]:
    """The number of positions that are solved, by loops."""
    lengths, depths = ({result[key] for result in run} for key in ("difficulty", "loops"))
    right = {
        loops: [exact_match([run], length, loops)[0] >= THRESHOLD for length in sorted(lengths)] for loops in depths
    }
    return {loops: int(np.cumprod(right[loops]).sum()) for loops in sorted(depths)}


def per_loop(positions: dict[int, int]) -> float:
    """Positions per loop, up to the first loops at which 90 % of the most are solved."""
    enough = 0.9 * max(positions.values())
    return next(count / loops for loops, count in positions.items() if count >= enough)


def fitted_exponent(needed: Sequence[float], speeds: Sequence[float]) -> float:
    """Of the speeds as a power of what is needed, by least squares of the logarithms; runs that solve nothing do not
    count."""
    pairs = [(a, b) for a, b in zip(needed, speeds, strict=True) if b > 0]
    return float(np.polyfit(*np.log(np.array(pairs)).T, 1)[0]) if len({a for a, _ in pairs}) > 1 else float("nan")


def main(words: list[str] | None = None) -> None:
    arguments = parser_of(__doc__).parse_args(words)
    length, budgets, _ = SIZES[arguments.size]
    arms = {loops: (f"positions_{loops}", overrides(arguments.size, loops)) for loops in budgets}
    runs = run_arms(arguments, "group", arms, folder(arguments))
    budgets = tuple(runs)
    seeds = min(len(results) for results in runs.values())
    positions = {loops: [solved(run) for run in runs[loops]] for loops in budgets}
    speeds = {loops: np.array([per_loop(found) for found in positions[loops]]) for loops in budgets}
    print("| loops T in training | positions per loop needed | solved at T / 2 | at T | at 2 T | solved per loop |")
    print("|---" * 6 + "|")
    for loops in budgets:
        cells = [
            spread(np.array([found[depth] for found in positions[loops]]), 1)
            for depth in (max(loops // 2, 1), loops, 2 * loops)
        ]
        print(f"| {loops} | {length / loops:g} | {' | '.join(cells)} | {spread(speeds[loops], 2)} |")

    def exponent(seeds: Sequence[int]) -> float:
        return fitted_exponent(
            [length / loops for loops in budgets for _ in seeds], [speeds[loops][i] for loops in budgets for i in seeds]
        )

    exponents = interval(seeds, exponent)
    print(f"\nexponent: {bracket(exponents)}, {seeds} seeds")
    save_json(arguments, "positions", {"positions": positions, "exponent": exponents})
    figure, (left, right) = panels(2)
    for loops in budgets:
        depths = list(positions[loops][0])
        counts = np.array([[found[depth] for depth in depths] for found in positions[loops]])
        band(left, depths, counts, label=f"trained with {loops}")
    loops_axis(left, [2**i for i in range((2 * max(budgets)).bit_length())])
    left.set_ylabel(f"positions solved, of {length}")
    needed = [length / loops for loops in budgets]
    band(right, needed, np.array([speeds[loops][:seeds] for loops in budgets]).T, label="measured")
    right.plot(needed, needed, "--", color="0.6", label="needed")
    right.set(xscale="log", yscale="log", xlabel="positions per loop that training needs", ylabel="solved per loop")
    right.set_xticks(needed, [f"{n:g}" for n in needed])
    right.set_yticks(needed, [f"{n:g}" for n in needed])
    right.minorticks_off()
    for axes in (left, right):
        tidy(axes)
    save(figure, folder(arguments) / "positions.png")


if __name__ == "__main__":
    main()
