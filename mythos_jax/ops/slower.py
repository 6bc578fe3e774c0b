"""Says when an accelerator does without the kernel that is made for it."""

from functools import cache

from mythos_jax.processes import log0


@cache
def say_slower(what: str, instead_of: str, reason: str) -> None:
    """Logs one line, once in a process: `what` runs instead of a kernel, and why."""
    log0(f"{what}, not {instead_of}: {reason}; this is slower (docs/speed.md)")
