"""Scores of a group of sources by models that trained with it and by one that did not.

Shapes: M members, N examples, P patients, R resamples, K classes.
"""

from typing import Any

import numpy as np

from covidjax.evaluation.metrics import compute_interval, draw_resamples, group_by_patient
from covidjax.evaluation.over_seeds import Estimate, estimate_auc, estimate_mean


def score_sick(
    scores_MxN: np.ndarray, calls_MxN: np.ndarray, is_sick_N: np.ndarray, patients_N: np.ndarray
) -> tuple[str, Estimate] | None:
    """Scores sick against normal.

    Args:
      scores_MxN: 1 - p of normal, or any score that is higher for sick examples.
      calls_MxN: whether each example is called sick, bool.
      is_sick_N: bool.
      patients_N: patient of each example.

    Returns:
      'AUC', the area under the ROC curve, if both occur; else 'sensitivity' or 'specificity', the share of right calls.
      With it the estimate. None without examples.
    """
    if not len(is_sick_N):
        return None
    groups = group_by_patient(patients_N)
    resamples = draw_resamples(int(groups.max()) + 1, seed=0)
    if is_sick_N.any() and not is_sick_N.all():
        return 'AUC', estimate_auc(scores_MxN, is_sick_N, groups, resamples)
    kind = 'sensitivity' if is_sick_N.all() else 'specificity'
    return kind, estimate_mean((calls_MxN == is_sick_N).astype(float), groups, resamples)


def describe_score(found: tuple[str, Estimate] | None) -> dict[str, Any] | None:
    """Returns {kind, value: mean over the members, interval by patient}; None without a score."""
    if found is None:
        return None
    kind, estimate = found
    return {
        'kind': kind,
        'value': float(estimate.by_seed.mean()),
        'interval': compute_interval(estimate.resampled),
    }


def subtract_scores(first: tuple[str, Estimate], second: tuple[str, Estimate]) -> dict[str, Any]:
    """Returns the difference of two scores of the same examples, {kind, value, interval}; paired by patient."""
    return {
        'kind': first[0],
        'value': float(first[1].by_seed.mean() - second[1].by_seed.mean()),
        'interval': compute_interval(first[1].resampled - second[1].resampled),
    }
