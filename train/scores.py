"""How good are predictions? The scores that classification and regression tasks are reported by."""

from collections.abc import Sequence

import numpy as np


def classification(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """`accuracy`; of two classes also `matthews` and `f1`, the latter of the second class.

    Args:
      logits: (n, classes).
      targets: (n,) numbers of the classes.

    >>> classification(np.array([[1, 0], [0, 1], [0, 1.0]]), np.array([0, 1, 0]))
    {'accuracy': 0.6666666666666666, 'matthews': 0.5, 'f1': 0.6666666666666666}
    """
    targets, chosen = targets.astype(int), logits.argmax(1)
    scores = {"accuracy": float(np.mean(chosen == targets))}
    if logits.shape[1] == 2:
        scores |= {"matthews": correlation(chosen, targets), "f1": f1(chosen, targets)}
    return scores


def regression(values: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """`pearson` and `spearman` of (n,) values and targets."""
    return {"pearson": correlation(values, targets), "spearman": correlation(ranks(values), ranks(targets))}


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; of two-valued arrays it is Matthews'. 0 where either does not vary.

    >>> correlation(np.array([1, 2, 3]), np.array([2, 4, 6])), correlation(np.ones(3), np.array([2, 4, 6]))
    (1.0, 0.0)
    """
    one, other = one.astype(np.float64) - np.mean(one), other.astype(np.float64) - np.mean(other)
    scale = float(np.sqrt(np.sum(one**2) * np.sum(other**2)))
    return float(np.sum(one * other)) / scale if scale else 0.0


def f1(chosen: np.ndarray, targets: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is neither chosen nor there."""
    both, either = np.sum((chosen == 1) & (targets == 1)), np.sum(chosen == 1) + np.sum(targets == 1)
    return float(2 * both / either) if either else 0.0


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The rank of every value from 0, equal values sharing the mean of theirs.

    >>> ranks([30, 10, 20, 10]).tolist()
    [3.0, 0.5, 2.0, 0.5]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]
