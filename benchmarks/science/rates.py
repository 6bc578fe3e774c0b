"""Learning rates, tuned alike: a plain transformer, a looped model and one with experts over the same few rates.

    .venv/bin/python -m benchmarks.science.rates [--size gpu] [--seeds 0 1]

Muon's learning rate on the matrices; AdamW's, on the rest, is a tenth of it. The scripts of this folder use the best of
each kind.
"""

from dataclasses import replace

from benchmarks.drawing import panels, save, tidy
from benchmarks.science.frame import Arm, folder, losses, parser_of, run_arms, save_json, spread
from benchmarks.timing import print_header, print_row

RATES = (0.01, 0.02, 0.04, 0.08)
KINDS = (Arm(4, 4), Arm(4, 1, loops=4), Arm(4, 1, loops=4, experts=4))


def at(kind: Arm, rate: float) -> Arm:
    """A kind at a rate; at the default rate it is the arm of the other scripts."""
    return kind if rate == kind.rate else replace(kind, rate=rate, more=(f", rate {rate}", ()))


def main(words: list[str] | None = None) -> None:
    arguments = parser_of(__doc__, seeds=(0,)).parse_args(words)
    rows = run_arms(arguments, [at(kind, rate) for kind in KINDS for rate in RATES])
    figure, (axes,) = panels(1)
    print_header("model", *map(str, RATES))
    for kind in KINDS:
        names = {rate: at(kind, rate).name(arguments.size) for rate in RATES}
        values = {rate: losses(rows[name], max(kind.loops, 1)) for rate, name in names.items() if name in rows}
        print_row(kind.name(arguments.size), *(spread(values[rate]) if rate in values else "" for rate in RATES))
        axes.plot(list(values), [value.mean() for value in values.values()], marker="o", label=kind.kind)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate of Muon")
    axes.set_ylabel("held-out nats per byte")
    tidy(axes)
    save(figure, folder(arguments) / "rates.png")
    save_json(arguments, "rates", rows)


if __name__ == "__main__":
    main()
