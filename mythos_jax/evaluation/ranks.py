"""Spearman's rank correlation: do harder inputs take more loops?"""

import numpy as np


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rho of two equally long lists of numbers, ties at their mean rank; None where one is constant."""
    x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in their order, float64; equal values share the mean of theirs."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.reshape(-1)]


def by_parts(x: np.ndarray, y: np.ndarray, parts: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Means of x and of y over `parts` parts of the pairs, equally many in each, from the smallest x on."""
    order = np.argsort(x, kind="stable")
    cut = [part for part in np.array_split(order, parts) if len(part)]
    return np.array([x[part].mean() for part in cut]), np.array([y[part].mean() for part in cut])
