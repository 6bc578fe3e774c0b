"""What a batch is, and which rows of it a process reads."""

from collections.abc import Sequence

import numpy as np

# "tokens" and "targets", int32 [B, T], and "mask", bool [B, T]: True where a target counts. With `data.document_mask`
# also "segment_ids", int32 [B, T]: the document of each target, counted from 1 in each row; 0 on padding. Rows of
# conversations have a mask of float32, the weight of each target (0: it does not count), and always segment_ids, the
# conversation of each token. All that takes sums or means over targets weighs them by the mask.
Batch = dict[str, np.ndarray]

# Rows of a global batch, as a slice or by number; None: all of them.
RowSelection = slice | Sequence[int] | np.ndarray | None


def row_numbers(selection: RowSelection, batch_size: int) -> np.ndarray:
    """The numbers, int64 [n], of the selected rows of a batch of `batch_size` rows."""
    numbers = np.arange(batch_size)
    if selection is None:
        return numbers
    return numbers[selection if isinstance(selection, slice) else np.asarray(selection, int)]
