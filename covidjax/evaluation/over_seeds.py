"""A score of several runs that differ only in their seed: its mean, with intervals over seeds and over patients.

The interval over seeds is for the mean of many such runs on these patients; that over patients is for the mean of these
runs on other patients of the same kind.

Shapes: M seeds, N examples, P patients, R resamples (see `metrics.draw_resamples`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from covidjax.evaluation.metrics import LEVEL, compute_interval, compute_ranking_scores


class Estimate(NamedTuple):
    """A score of every run, and its mean over the runs in every resample of the patients.

    Attributes:
      by_seed: [M].
      resampled: [R], NaN where the score is undefined in a resample.
    """

    by_seed: np.ndarray
    resampled: np.ndarray


def estimate_mean(values_MxN: np.ndarray, groups_N: np.ndarray, resamples_RxP: np.ndarray) -> Estimate:
    """Estimates the mean of a value over examples.

    Args:
      values_MxN: finite value of each example in each run.
      groups_N: index of each example's patient, 0 .. P-1.
      resamples_RxP: how often each patient is drawn.
    """
    num_patients = resamples_RxP.shape[1]
    sums_P = np.bincount(groups_N, values_MxN.mean(0), minlength=num_patients)
    counts_R = resamples_RxP @ np.bincount(groups_N, minlength=num_patients)
    resampled = np.divide(resamples_RxP @ sums_P, counts_R, out=np.full(len(counts_R), np.nan), where=counts_R > 0)
    return Estimate(values_MxN.mean(1), resampled)


def estimate_auc(
    scores_MxN: np.ndarray, positive_N: np.ndarray, groups_N: np.ndarray, resamples_RxP: np.ndarray
) -> Estimate:
    """Estimates the area under the ROC curve: the share of (positive, negative) pairs ordered correctly, ties half.

    Args:
      scores_MxN: score of each example in each run, higher for positives.
      positive_N: bool, with at least one positive and one negative.
      groups_N, resamples_RxP: see `estimate_mean`.
    """
    whole = np.ones((1, resamples_RxP.shape[1]), int)
    weights = np.concatenate([whole, resamples_RxP])
    auc_MxR = np.stack([compute_ranking_scores(s, positive_N, groups_N, weights)['auc'] for s in scores_MxN])
    return Estimate(auc_MxR[:, 0], auc_MxR[:, 1:].mean(0))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Returns the mean of several estimates, such as the AUC of every class."""
    return Estimate(*(np.mean(values, axis=0) for values in zip(*estimates, strict=True)))


def subtract(first: Estimate, second: Estimate) -> Estimate:
    """Returns the difference of two estimates with the same seeds and resamples, paired by both."""
    return Estimate(first.by_seed - second.by_seed, first.resampled - second.resampled)


def summarise(estimate: Estimate) -> dict[str, Any]:
    """Returns an estimate as a JSON-able dict.

    Returns:
      'mean' over the seeds, 'by_seed', 'over_seeds' (Student's t interval; None for one seed) and 'over_patients'
      (percentile interval of the resampled means; None if all are undefined).
    """
    mean, count = float(estimate.by_seed.mean()), len(estimate.by_seed)
    over_seeds = None
    if count > 1:
        margin = scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1) * estimate.by_seed.std(ddof=1) / np.sqrt(count)
        over_seeds = [float(mean - margin), float(mean + margin)]
    return {
        'mean': mean,
        'by_seed': estimate.by_seed.tolist(),
        'over_seeds': over_seeds,
        'over_patients': compute_interval(estimate.resampled),
    }
