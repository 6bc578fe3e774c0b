"""Depth that is needed: nested arithmetic (Mano, arXiv 2510.25741), by k layers in D / k loops, at equal FLOPs.

    .venv/bin/python -m benchmarks.science.mano [--size gpu] [--seeds 0 1 2]

Trains configs/tasks/arithmetic.yaml with k layers in D / k loops for several k, of which k = D is a plain transformer,
and with k layers in one pass, which have as many parameters and fewer FLOPs. Prints exact match at each number of
operations, in percent.
"""

from benchmarks.drawing import panels, save, tidy
from benchmarks.exact_match import SMOKE, TASKS, exact_match, run_arms
from benchmarks.science.frame import folder, parser_of, save_json, spread
from mythos_jax.config import Config, load_config
from mythos_jax.flops import count_parameters

# Executed layers D, numbers of layers k, and overrides.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[str, ...]]] = {
    "cpu": (4, (1, 2, 4), ()),
    "gpu": (
        12,
        (2, 3, 6, 12),
        (
            *("--data.task.alphabet=23", "--data.task.difficulty=[1,2,3,4,5,6,7,8,9,10]", "--data.seq_len=22"),
            "--model.max_seq_len=32",
            *("--evaluation.difficulties=[4,6,8,10]", "--data.task.answers=last", "--model.dim=256"),
            *("--model.hidden_dim=688", "--model.n_heads=8", "--model.n_kv_heads=8", "--training.steps=6000"),
            *("--training.batch_size=512", "--evaluation.batch_size=512", "--training.warmup_steps=300"),
        ),
    ),
    "smoke": (2, (1, 2), SMOKE),
}


def overrides(size: str, layers: int, loops: int) -> list[str]:
    """Of configs/tasks/arithmetic.yaml."""
    shape = [f"--model.loop_layers={layers}", f"--model.loops={loops}", f"--evaluation.loops=[{loops}]"]
    return [*shape, *SIZES[size][2]]


def config_of(size: str, layers: int, loops: int) -> Config:
    return load_config(TASKS / "arithmetic.yaml", overrides(size, layers, loops))


def main(words: list[str] | None = None) -> None:
    arguments = parser_of(__doc__).parse_args(words)
    size = arguments.size
    depth, widths, _ = SIZES[size]
    shapes = [(k, depth // k) for k in widths] + [(k, 1) for k in widths if k < depth]
    named = {shape: (f"mano_{shape[0]}x{shape[1]}", overrides(size, *shape)) for shape in shapes}
    runs = run_arms(arguments, "arithmetic", named, folder(arguments))
    arms = list(runs)
    difficulties = config_of(size, *arms[0]).evaluation.difficulties
    heads = [f"{n} operation{'s' if n > 1 else ''}" for n in difficulties]
    print(f"| layers x loops | parameters | {' | '.join(heads)} |\n" + "|---" * (2 + len(heads)) + "|")
    for layers, loops in arms:
        cells = [spread(exact_match(runs[layers, loops], n, loops), 1) for n in difficulties]
        parameters = count_parameters(config_of(size, layers, loops).model)
        print(f"| {layers} x {loops} | {parameters / 1e3:.0f} k | {' | '.join(cells)} |")
    save_json(arguments, "mano", {f"{layers}x{loops}": results for (layers, loops), results in runs.items()})

    figure, (axes,) = panels(1)
    hardest = max(difficulties)
    for label, chosen in [
        (f"{depth} executed layers: k layers in {depth}/k loops", [arm for arm in arms if arm[0] * arm[1] == depth]),
        ("k layers, one pass", [arm for arm in arms if arm[1] == 1]),
    ]:
        xs = sorted(k for k, _ in chosen)
        values = [exact_match(runs[arm], hardest, arm[1]) for arm in sorted(chosen)]
        deviations = [value.std(ddof=1) if len(value) > 1 else 0.0 for value in values]
        axes.errorbar(xs, [value.mean() for value in values], deviations, marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(k) for k in widths])
    axes.minorticks_off()
    axes.set(xlabel="layers k with weights of their own", ylabel=f"exact match at {hardest} operations, %")
    tidy(axes)
    save(figure, folder(arguments) / "mano.png")


if __name__ == "__main__":
    main()
