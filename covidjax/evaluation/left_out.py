"""Scores of a group of sources by models that trained with it and by one that did not.

Shapes: M members, N examples, P patients, R resamples, K classes.
"""

from typing import Any, NamedTuple

import numpy as np

from covidjax.evaluation.metrics import compute_interval, compute_wilson_interval, draw_resamples, group_by_patient
from covidjax.evaluation.over_seeds import Estimate, estimate_auc, estimate_mean

MIN_PATIENTS = 5  # of each class, for an interval: resampling fewer misleads


class Score(NamedTuple):
    """A score of sick against normal.

    Attributes:
      kind: 'AUC', the area under the ROC curve, or 'sensitivity' or 'specificity', the share of right calls.
      estimate: the score by member; NaN in all resamples with fewer than `MIN_PATIENTS` of a class.
      num_patients: P.
    """

    kind: str
    estimate: Estimate
    num_patients: int


def score_sick(
    scores_MxN: np.ndarray, calls_MxN: np.ndarray, is_sick_N: np.ndarray, patients_N: np.ndarray
) -> Score | None:
    """Scores sick against normal: by AUC if both occur, else by the calls.

    Args:
      scores_MxN: 1 - p of normal, or any score that is higher for sick examples.
      calls_MxN: whether each example is called sick, bool.
      is_sick_N: bool.
      patients_N: patient of each example.

    Returns:
      The score; None without examples.
    """
    if not len(is_sick_N):
        return None
    groups = group_by_patient(patients_N)
    num_patients = int(groups.max()) + 1
    resamples = draw_resamples(num_patients, seed=0)
    if is_sick_N.any() and not is_sick_N.all():
        kind, estimate = 'AUC', estimate_auc(scores_MxN, is_sick_N, groups, resamples)
    else:
        kind = 'sensitivity' if is_sick_N.all() else 'specificity'
        estimate = estimate_mean((calls_MxN == is_sick_N).astype(float), groups, resamples)
    if min(len(set(patients_N[is_sick_N == side])) for side in set(is_sick_N.tolist())) < MIN_PATIENTS:
        estimate = estimate._replace(resampled=np.full(len(resamples), np.nan))
    return Score(kind, estimate, num_patients)


def describe_score(score: Score | None) -> dict[str, Any] | None:
    """Returns {kind, value: mean over the members, interval}; None without a score.

    The interval is by patient; a share of exactly 0 or 1 has Wilson's with one trial per patient.
    """
    if score is None:
        return None
    value, interval = float(score.estimate.by_seed.mean()), compute_interval(score.estimate.resampled)
    if score.kind != 'AUC' and value in (0, 1):
        interval = compute_wilson_interval(value * score.num_patients, score.num_patients)
    return {'kind': score.kind, 'value': value, 'interval': interval}


def subtract_scores(first: Score, second: Score) -> dict[str, Any]:
    """Returns the difference of two scores of the same examples, {kind, value, interval}; paired by patient."""
    return {
        'kind': first.kind,
        'value': float(first.estimate.by_seed.mean() - second.estimate.by_seed.mean()),
        'interval': compute_interval(first.estimate.resampled - second.estimate.resampled),
    }
