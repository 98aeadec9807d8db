"""Scores with their resampled values, so that two of them can be subtracted with an interval.

Patients are resampled. Shapes: N examples, K classes, P patients, R resamples.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.evaluation.calibration import NUM_BINS
from covidjax.evaluation.metrics import (
    compute_interval,
    compute_ranking_scores,
    compute_wilson_interval,
    draw_resamples,
    group_by_patient,
)


class Estimate(NamedTuple):
    """A score.

    Attributes:
      value: None if it is undefined.
      interval: [low, high] by patient; None if there is none.
      resampled: the score of every resample of the patients [R], NaN where it is undefined.
      is_fixed: all resamples agree, because a share or an area is 0 or 1. The interval is then Wilson's.
    """

    value: float | None
    interval: list[float] | None
    resampled: np.ndarray
    is_fixed: bool = False


UNDEFINED = Estimate(None, None, np.zeros(0))


class Sample(NamedTuple):
    """The patients of some examples and how often each resample draws them.

    Attributes:
      groups: index of each example's patient, int [N], 0 .. P-1.
      resamples: int [R, P].
    """

    groups: np.ndarray
    resamples: np.ndarray


def draw_sample(patients: Sequence[str], *, seed: int) -> Sample:
    """Draws resamples of the patients of N examples. Samples of other patients need another seed to be independent."""
    groups = group_by_patient(patients)
    return Sample(groups, draw_resamples(int(groups.max(initial=-1)) + 1, seed=seed))


def estimate_mean(sample: Sample, values_N: np.ndarray, members_N: np.ndarray | None = None) -> Estimate:
    """Estimates the mean of numbers, or the share of hits if `values_N` is bool, over the examples in `members_N`."""
    members_N = np.ones(len(values_N), bool) if members_N is None else members_N
    if not members_N.any():
        return UNDEFINED
    num_patients = sample.resamples.shape[1]
    sums_P, counts_P = (
        np.bincount(sample.groups[members_N], weights, num_patients)
        for weights in (values_N[members_N].astype(float), None)
    )
    value, trials = float(sums_P.sum() / counts_P.sum()), int((counts_P > 0).sum())
    counts_R = sample.resamples @ counts_P
    resampled = np.divide(sample.resamples @ sums_P, counts_R, out=np.full(len(counts_R), np.nan), where=counts_R > 0)
    if values_N.dtype == bool and value in (0, 1):
        return Estimate(value, compute_wilson_interval(value * trials, trials), resampled, is_fixed=True)
    return Estimate(value, None if trials == 1 else compute_interval(resampled), resampled)


def estimate_auc(sample: Sample, scores_N: np.ndarray, positive_N: np.ndarray) -> Estimate:
    """Estimates the area under the ROC curve; undefined without positives or without negatives.

    An area of 0 or 1 gets Wilson's interval with as many trials as there are pairs of one positive and one negative
    patient, no patient in two. There is no interval if all positives, or all negatives, are of one patient.
    """
    if positive_N.all() or not positive_N.any():
        return UNDEFINED
    weights = np.concatenate([np.ones((1, sample.resamples.shape[1]), int), sample.resamples])
    values = compute_ranking_scores(scores_N, positive_N, sample.groups, weights)['auc']
    value = float(values[0])
    num_pairs = min(len(set(sample.groups[members].tolist())) for members in (positive_N, ~positive_N))
    if num_pairs == 1:
        return Estimate(value, None, values[1:])
    if value in (0, 1):
        return Estimate(value, compute_wilson_interval(value * num_pairs, num_pairs), values[1:], is_fixed=True)
    return Estimate(value, compute_interval(values[1:]), values[1:])


def estimate_ece(sample: Sample, probabilities_NxK: np.ndarray, labels_N: np.ndarray) -> Estimate:
    """Estimates the expected calibration error (see `calibration.compute_calibration`).

    The error is a sum of absolute values, so resamples lie above the value on average: read the interval with care.
    """
    if not len(labels_N):
        return UNDEFINED
    confidence = probabilities_NxK.max(1)
    gap_N = (probabilities_NxK.argmax(1) == labels_N) - confidence
    bins = np.clip(np.searchsorted(np.linspace(0, 1, NUM_BINS + 1), confidence) - 1, 0, NUM_BINS - 1)
    num_patients = sample.resamples.shape[1]
    gaps_PxB = np.zeros((num_patients, NUM_BINS))
    np.add.at(gaps_PxB, (sample.groups, bins), gap_N)
    counts_P = np.bincount(sample.groups, minlength=num_patients)
    resampled = np.abs(sample.resamples @ gaps_PxB).sum(1) / (sample.resamples @ counts_P)
    value = float(np.abs(gaps_PxB.sum(0)).sum() / len(labels_N))
    return Estimate(value, compute_interval(resampled) if num_patients > 1 else None, resampled)


def subtract(first: Estimate, second: Estimate) -> dict[str, Any]:
    """Returns {'difference', 'interval'} of first less second, whose patients were resampled independently.

    The interval holds the percentiles of the differences of the resamples. Where all resamples of a side agree, it
    combines the intervals of both sides instead (Zou and Donner 2008, doi:10.1002/sim.3095, eq. 7; for two of Wilson's
    intervals that is Newcombe's). Either is None if a side has none.
    """
    if first.value is None or second.value is None:
        return {'difference': None, 'interval': None}
    difference = first.value - second.value
    if first.interval is None or second.interval is None:
        return {'difference': difference, 'interval': None}
    if not (first.is_fixed or second.is_fixed):
        return {'difference': difference, 'interval': compute_interval(first.resampled - second.resampled)}
    (low1, high1), (low2, high2) = first.interval, second.interval
    below = np.hypot(first.value - low1, high2 - second.value)
    above = np.hypot(high1 - first.value, second.value - low2)
    return {'difference': difference, 'interval': [float(difference - below), float(difference + above)]}


def describe(estimate: Estimate) -> dict[str, Any]:
    """Returns {'value', 'interval'}."""
    return {'value': estimate.value, 'interval': estimate.interval}
