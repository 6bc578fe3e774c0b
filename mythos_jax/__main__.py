"""`mythos`, and `python -m mythos_jax`: handles signals from the first moment on, then runs `cli.main`."""

import os
import signal
import sys

from mythos_jax.errors import FAILED
from mythos_jax.interrupts import end_at_once, is_default


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    ours = is_default()
    if ours:
        signal.signal(signal.SIGINT, end_at_once)
    if sys.argv[1:2] == ["train"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end_at_once)  # until `train` itself handles it
    from mythos_jax.cli import main as run_command

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_command()
    except KeyboardInterrupt:
        end_at_once(signal.SIGINT, None)
        raise
    if code == FAILED and "orbax" in sys.modules:
        # What is left of a checkpoint's failed read or write goes on in threads of C++, which print tracebacks when
        # Python ends under them. All of ours is written and flushed.
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
