"""`mythos`, and `python -m mythos_jax`: handles signals from the first moment on, then runs `cli.main`."""

import os
import signal
import sys
from types import FrameType

from mythos_jax.errors import INTERRUPTED, RESTART


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # it may be ignored, as after nohup
    if ours:
        signal.signal(signal.SIGINT, _end)
    if sys.argv[1:2] == ["train"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)  # until `train` itself handles it
    from mythos_jax.cli import main as run_command

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run_command()
    except KeyboardInterrupt:
        _end(signal.SIGINT, None)
        raise


def _end(number: int, frame: FrameType | None) -> None:
    """Ends at once: nothing has begun yet, and an interrupted import could only end in a traceback."""
    restart = number == signal.SIGTERM
    os.write(2, b"mythos: stopped by SIGTERM; run the same command again\n" if restart else b"mythos: interrupted\n")
    os._exit(RESTART if restart else INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
