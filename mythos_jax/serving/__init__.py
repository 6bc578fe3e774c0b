"""Serving: many requests at once, each token at a depth of its own."""
