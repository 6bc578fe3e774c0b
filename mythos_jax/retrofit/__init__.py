"""Looped models cut out of dense ones (arXiv 2511.07384)."""
