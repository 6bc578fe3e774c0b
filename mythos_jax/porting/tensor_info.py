"""What is known of a stored tensor before it is read."""

from dataclasses import dataclass

import numpy as np

from mythos_jax.porting.layouts import Shape

UNKNOWN = np.dtype(np.void)  # of numbers that cannot be read


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor.

    kind: what it is if its numbers cannot be read, such as "a sparse tensor"; empty if they can.
    """

    shape: Shape
    dtype: np.dtype
    kind: str = ""
