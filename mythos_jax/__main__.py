"""`python -m mythos_jax` is `mythos`."""

import sys

from mythos_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
