"""Measurements behind the numbers in docs/: speed, quality against depth, what halting saves."""
