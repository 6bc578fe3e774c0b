"""The argmax over the vocabulary, computed in chunks, against that of the complete logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from mythos_jax.ops.chunked_argmax import chunked_argmax


@pytest.mark.parametrize("chunk", [None, 4, 5])
def test_chunks_do_not_change_the_argmax(chunk):
    rng = np.random.default_rng(2)
    features, table = rng.normal(size=(2, 12, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    best = chunked_argmax(jnp.asarray(features), jnp.asarray(table), chunk)
    np.testing.assert_array_equal(best, (features @ table.T).argmax(-1))
