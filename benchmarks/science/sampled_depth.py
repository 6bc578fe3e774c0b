"""Flat beyond the trained depth: a depth drawn for each row or batch against a fixed one, and what a step costs.

    .venv/bin/python -m benchmarks.science.sampled_depth [--size gpu] [--seeds 0 1 2] [--repeats 7] [--finished]

Prints the loss from half to four times the trained depth, the spread over those depths, and differences to the fixed
depth within each seed. The time of a step is measured in turns in one process, over the same steps of each run; the
programs that were compiled meanwhile are counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from benchmarks.drawing import band, loops_axis, panels, save, tidy
from benchmarks.science.frame import Arm, folder, losses, parser_of, run_arms, save_json, spread
from benchmarks.steps import train_step
from benchmarks.timing import Call, Times, median_and_range, print_header, print_row, ratios, time_in_turns

FIXED = Arm(4, 1, loops=4)
_POISSON = ("--training.depth.distribution=poisson",)
SAMPLED = replace(FIXED, more=(", sampled", _POISSON))
ARMS = (
    FIXED,
    SAMPLED,
    replace(FIXED, more=(", sampled per batch", (*_POISSON, "--training.depth.sample_per=batch"))),
    replace(FIXED, more=(", sampled, gradient of 2", (*_POISSON, "--training.depth.backprop_loops=2"))),
)
STEPS = 16  # of a turn


def several(step: Call) -> None:
    for _ in range(STEPS):
        step()


def step_times(arms: Sequence[Arm], size: str, repeats: int) -> tuple[Times, int]:
    """Seconds of STEPS steps of each run, in turns, and how many programs were compiled after the first ones."""
    compiled = []

    def count(event: str, duration_secs: float, **more: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(duration_secs)

    steps = {arm.name(size): train_step(arm.config(size)) for arm in arms}
    for step in steps.values():
        step()
    jax.monitoring.register_event_duration_secs_listener(count)
    turns: dict[str, Call] = {name: partial(several, step) for name, step in steps.items()}
    return time_in_turns(turns, repeats)[0], len(compiled)


def main(words: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="turns of the timing; 0: none")
    arguments = parser.parse_args(words)
    rows = run_arms(arguments, ARMS)
    arms = [arm for arm in ARMS if arm.name(arguments.size) in rows]
    times, compiled = step_times(arms if arguments.repeats else (), arguments.size, arguments.repeats)
    depths = [FIXED.loops * factor // 2 for factor in (1, 2, 4, 8)]
    fixed_name = FIXED.name(arguments.size)
    timing = ("ms per step", "times fixed") if arguments.repeats else ()
    print_header("trained at", *map(str, depths), "spread", f"at {FIXED.loops}, minus fixed", *timing)
    figure, (axes,) = panels(1)
    for arm in arms:
        name = arm.name(arguments.size)
        values = np.stack([losses(rows[name], depth) for depth in depths], axis=1)
        shared = min(len(values), len(rows.get(fixed_name, ())))
        cells = [spread(column) for column in values.T] + [spread(values.max(1) - values.min(1))]
        fixed = losses(rows[fixed_name], FIXED.loops) if shared else None
        cells.append("" if fixed is None else spread(losses(rows[name], FIXED.loops)[:shared] - fixed[:shared]))
        if arguments.repeats:
            cells.append(median_and_range(times[name], 1e3 / STEPS))
            same = times.get(fixed_name)
            cells.append("" if same is None else median_and_range(ratios(times[name], same), digits=2))
        print_row(name, *cells)
        band(axes, depths, values, label=f"trained at {FIXED.loops} loops" + (arm.more[0] or ", fixed"))
    if arguments.repeats:
        print(
            f"{compiled} programs were compiled after each run's first step; {arguments.repeats} turns of {STEPS} steps"
        )
    loops_axis(axes, depths)
    axes.set_ylabel("held-out nats per byte")
    tidy(axes)
    save(figure, folder(arguments) / "sampled_depth.png")
    save_json(arguments, "sampled_depth", {"runs": rows, "seconds of steps": times})


if __name__ == "__main__":
    main()
