"""The numbers of a summary as people read them, in the terminal and on the page."""

from collections.abc import Callable

from mythos_jax.watch.summary import Summary, duration

_GIB = 2**30

NONE = "–"


def number(summary: Summary, name: str, form: str, unit: str = "", factor: float = 1.0) -> str:
    """A value of the last line; a dash if there is none."""
    value = summary.values.get(name)
    return NONE if value is None else f"{value * factor:{form}}{unit}"


def step(summary: Summary) -> str:
    """Such as 420 of 1,000 (42 %)."""
    if not summary.steps:
        return f"{summary.step:,}"
    return f"{summary.step:,} of {summary.steps:,} ({summary.step / summary.steps:.0%})"


def state(summary: Summary) -> str:
    return f"{summary.state} {summary.detail}".strip() if summary.state == "stopped" else summary.state


def details(summary: Summary) -> str:
    """What is to be said about the state, beside its word; mostly nothing."""
    detail = "" if summary.state == "stopped" else summary.detail
    said = "; ".join(filter(None, [detail, summary.problem]))
    return "".join(character if character.isprintable() else "?" for character in said)  # it is a file's


def time_left(summary: Summary) -> str:
    return NONE if summary.seconds_left is None else duration(summary.seconds_left)


def flops(summary: Summary) -> str:
    """Per second, of all devices."""
    value = summary.values.get("flops_per_second", 0.0)
    for prefix, size in [("P", 1e15), ("T", 1e12), ("G", 1e9)]:
        if value >= size:
            return f"{value / size:.1f} {prefix}FLOP/s"
    return NONE if not value else f"{value / 1e6:.1f} MFLOP/s"


def plain(value: float) -> str:
    """A number whose unit is said elsewhere."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def seconds(value: float) -> str:
    """A short time, in the unit that suits it."""
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def step_time(summary: Summary, brief: bool = False) -> str:
    """Median, 90th percentile and longest. brief: the median alone."""
    names = {"p50": "median"} if brief else {"p50": "median", "p90": "p90", "max": "longest"}
    found = {word: summary.values.get(f"step_seconds_{name}") for name, word in names.items()}
    return ", ".join(f"{seconds(value)} {word}" for word, value in found.items() if value is not None) or NONE


def data_wait(summary: Summary) -> str:
    value = summary.values.get("data_wait")
    return NONE if value is None else f"{seconds(value)} per step"


def memory(summary: Summary) -> str:
    used, peak, limit = (summary.values.get(f"hbm_{name}bytes") for name in ("", "peak_", "limit_"))
    if used is None:
        return NONE
    words = f"{used / _GIB:.1f} GiB"
    if limit is not None:
        words += f" of {limit / _GIB:.1f}"
    return words if peak is None else f"{words}, peak {peak / _GIB:.1f}"


def goodput(summary: Summary) -> str:
    """Since the first start, over all restarts."""
    return NONE if summary.times is None else f"{summary.times.goodput:.1%}"


def restarts(summary: Summary) -> str:
    return NONE if summary.restarts is None else f"{summary.restarts:,}"


def lost(summary: Summary) -> str:
    return NONE if summary.lost_steps is None else f"{summary.lost_steps:,}"


def where_time_went(summary: Summary) -> str:
    """Such as 2 h of steps that count, 3 min of steps that were lost, …; empty if it is not known."""
    times = summary.times
    if times is None:
        return ""
    parts = [
        (times.counted, "steps that count"),
        (times.lost, "steps that were lost"),
        (times.down, "not running"),
        (times.rest, "compiling, waiting, evaluating, saving"),
    ]
    return ", ".join(f"{duration(value)} {words}" for value, words in parts if value >= 0.5)


def _last(name: str, form: str) -> Callable[[Summary], str]:
    return lambda summary: number(summary, name, form)


# What is shown of runs side by side, by name, in this order.
NUMBERS: dict[str, Callable[[Summary], str]] = {
    "step": step,
    "time left": time_left,
    "loss": _last("loss", ".4f"),
    "held-out loss": _last("held_out_loss", ".4f"),
    "loops": _last("mean_loops", ".2f"),
    "tokens/s": _last("tokens_per_second", ",.0f"),
    "model FLOPs": flops,
    "MFU": _last("mfu", ".1%"),
    "step time": step_time,
    "data wait": data_wait,
    "HBM": memory,
    "goodput": goodput,
    "restarts": restarts,
    "steps lost": lost,
    "skipped": _last("skipped", ".0f"),
}
