"""Scores of one map or mask against one region, and their averages over examples.

A map without preference, flat or all zero, gets the chance level of every score, never NaN.
"""

from collections.abc import Sequence

import numpy as np
import scipy

from covidjax.evaluation.metrics import compute_interval, draw_resamples, group_by_patient


def compute_pointing(scores: np.ndarray, target: np.ndarray) -> float:
    """Returns 1 if the highest score lies in the target, else 0; for ties, the share inside (Zhang et al. 2018).

    Args:
      scores: float, of any shape.
      target: bool, of the same shape.
    """
    return float(target[scores == scores.max()].mean())


def compute_energy(scores: np.ndarray, target: np.ndarray) -> float:
    """Returns the share of the map's sum that lies in the target (Wang et al. 2020); scores are at least 0."""
    total = scores.sum()
    return float(scores[target].sum() / total) if total > 0 else float(target.mean())


def compute_rank_auc(scores: np.ndarray, target: np.ndarray) -> float | None:
    """Returns the share of (inside, outside) pairs with the higher score inside, ties half; None without such pairs."""
    inside = int(target.sum())
    outside = target.size - inside
    if not inside or not outside:
        return None
    ranks = scipy.stats.rankdata(scores.ravel())[target.ravel()].sum()
    return float((ranks - inside * (inside + 1) / 2) / (inside * outside))


def compute_dice(mask: np.ndarray, target: np.ndarray) -> float | None:
    """Returns the Dice score, twice the overlap over the sum of the areas; None if both are empty."""
    total = int(mask.sum() + target.sum())
    return 2 * int((mask & target).sum()) / total if total else None


def average_by_patient(
    values: Sequence[float | None], patients: Sequence[str], *, weights: Sequence[float] | None = None, seed: int = 0
) -> dict:
    """Averages values over the examples that have one.

    Args:
      values: one per example.
      patients: patient of each example.
      weights: of the examples, at least 0, in the average; equal by default.
      seed: of the resampling.

    Returns:
      {'mean', 'interval', 'number'}, the interval by bootstrap over patients; mean and interval are None if no example
      has a value or a weight.
    """
    known = [i for i, value in enumerate(values) if value is not None]
    found = np.array([values[i] for i in known], float)
    weight = np.ones(len(known)) if weights is None else np.array([weights[i] for i in known], float)
    if not weight.sum():
        return {'mean': None, 'interval': None, 'number': 0}
    groups = group_by_patient([patients[i] for i in known])
    sums, counts = np.bincount(groups, found * weight), np.bincount(groups, weight)
    resamples = draw_resamples(len(sums), seed=seed)
    with np.errstate(invalid='ignore'):  # a resample may have no weight
        resampled = resamples @ sums / (resamples @ counts)
    return {
        'mean': float(sums.sum() / counts.sum()),
        'interval': compute_interval(resampled),
        'number': len(known),
    }
