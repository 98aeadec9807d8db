"""Sick or not, from the lesions of a slice or scan; and the verdict that joins it with a classifier.

The lesions decide whether a scan is sick, the classifier which disease it is: with s the probability of sick and q that
of COVID-19 given sick, normal, pneumonia and COVID-19 have the probabilities 1 - s, s (1 - q) and s q.

Shapes: N slices or scans, T slices of a scan, h side of the grid of outlines, K = 3 classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from covidjax.evaluation.predictions import softmax

_WORST = 0.2  # share of the slices of a scan
_FLOOR = 1e-4  # of a share, before its logarithm: 0.01 % of the lungs
_TINY = 1e-6


class SickRule(NamedTuple):
    """A logistic of the logarithms of both features of `compute_features`.

    Attributes:
      weights: of the features.
      bias: added to their weighted sum.
    """

    weights: tuple[float, float]
    bias: float


def count_areas(probabilities_Nxhxhx3: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the areas of the lungs and of the lesions in slices without Hounsfield units, float [N], in positions.

    The lungs are what the model calls lungs or lesion. For slices with Hounsfield units see `burden`.

    Args:
      probabilities_Nxhxhx3: of lungs, lesion and consolidation given lesion.
      threshold: of the lesion probability.
    """
    is_lesion = probabilities_Nxhxhx3[..., 1] >= threshold
    is_lungs = (probabilities_Nxhxhx3[..., 0] > 0.5) | is_lesion
    return is_lungs.sum((1, 2)).astype(float), is_lesion.sum((1, 2)).astype(float)


def compute_features(lungs_T: np.ndarray, lesions_T: np.ndarray) -> np.ndarray:
    """Returns the share of the lungs with lesions, of the scan and of the worst fifth of its slices, [2].

    The worst fifth are the slices with the largest shares, at least one, of those that show lungs. A single slice has
    the same share twice; a scan without lungs has 0.

    Args:
      lungs_T, lesions_T: areas in each slice.
    """
    shown = lungs_T > 0
    if not shown.any():
        return np.zeros(2)
    shares = lesions_T[shown] / lungs_T[shown]
    worst = np.sort(shares)[-max(1, round(_WORST * len(shares))) :]
    return np.array([lesions_T.sum() / lungs_T.sum(), worst.mean()])


def fit_sick(features_Nx2: np.ndarray, is_sick_N: np.ndarray) -> SickRule:
    """Fits the logistic; sick and normal weigh the same.

    Raises:
      ValueError: all are sick, or none is.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    if is_sick_N.all() or not is_sick_N.any():
        raise ValueError('sick and normal examples are needed')
    fitted = LogisticRegression(class_weight='balanced').fit(_take_logarithms(features_Nx2), is_sick_N)
    return SickRule(tuple(fitted.coef_[0].tolist()), float(fitted.intercept_[0]))


def compute_sick(rule: SickRule, features_Nx2: np.ndarray) -> np.ndarray:
    """Returns the probability of sick [N], never 0 or 1, so that its logarithm is finite."""
    logits = _take_logarithms(features_Nx2) @ np.array(rule.weights) + rule.bias
    return np.clip(1 / (1 + np.exp(-logits)), _TINY, 1 - _TINY)


def _take_logarithms(features_Nx2: np.ndarray) -> np.ndarray:
    return np.log(features_Nx2 + _FLOOR)


def join(sick_N: np.ndarray, probabilities_NxK: np.ndarray) -> np.ndarray:
    """Returns the joined probabilities [N, K] of normal, pneumonia and COVID-19.

    Args:
      sick_N: probability of sick.
      probabilities_NxK: of the classifier, which gives q = covid19 / (pneumonia + covid19).
    """
    pneumonia_N, covid19_N = probabilities_NxK[:, 1] + _TINY, probabilities_NxK[:, 2] + _TINY
    q_N = covid19_N / (pneumonia_N + covid19_N)
    return np.stack([1 - sick_N, sick_N * (1 - q_N), sick_N * q_N], axis=1)


def join_logits(sick_N: np.ndarray, logits_NxK: np.ndarray) -> np.ndarray:
    """Returns the logarithms of `join` [N, K], which serve as logits; `logits_NxK` are the classifier's."""
    return np.log(join(sick_N, softmax(logits_NxK)))


def describe_disagreement(joined_K: Sequence[float], classifier_K: Sequence[float]) -> str:
    """Returns what to tell of a classifier that disagrees on sick or not, '' if it agrees."""
    is_sick, says_sick = joined_K[0] < 0.5, classifier_K[0] < 0.5
    if is_sick == says_sick:
        return ''
    seen = 'show disease' if is_sick else 'show no disease'
    return (
        f'the lesions {seen}, but the classifier alone gives normal a probability of {classifier_K[0]:.2f}: look at '
        'the slices'
    )
