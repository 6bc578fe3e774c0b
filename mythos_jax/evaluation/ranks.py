"""Do harder inputs take more loops? Spearman's rank correlation, and means over bins of equal size."""

import numpy as np


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rho of two sequences of equal length, ties at their mean rank; None where it is undefined: one
    sequence is constant or has a NaN, or there are fewer than two pairs."""
    from scipy.stats import spearmanr  # takes a second to import, which every training run would pay

    x, y = np.asarray(x), np.asarray(y)
    if x.size < 2 or np.all(x == x[0]) or np.all(y == y[0]):
        return None
    rho = float(spearmanr(x, y).statistic)
    return None if np.isnan(rho) else rho


def binned_means(x: np.ndarray, y: np.ndarray, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Means of x and of y in each of `bins` bins of (nearly) equal size, in ascending order of x."""
    order = np.argsort(x, kind="stable")
    members = [indices for indices in np.array_split(order, bins) if len(indices)]
    return np.array([x[indices].mean() for indices in members]), np.array([y[indices].mean() for indices in members])
