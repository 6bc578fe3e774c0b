"""From text to batches of token rows: tokenizer, sources, prepare (once), pipeline (every step)."""
