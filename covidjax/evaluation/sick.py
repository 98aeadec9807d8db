"""Sick or not, from the lesions of a slice or scan; and the verdict that joins it with a classifier.

The lesions decide whether a scan is sick, the classifier which disease it is: with s the probability of sick and q that
of COVID-19 given sick, normal, pneumonia and COVID-19 have the probabilities 1 - s, s (1 - q) and s q.

Shapes: N slices or scans, T slices of a scan, h side of the grid of outlines, K = 3 classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.errors import UserError
from covidjax.evaluation.predictions import softmax

_WORST = 0.2  # share of the slices of a scan
_FLOOR = 1e-4  # of a share, before its logarithm: 0.01 % of the lungs
_MARGIN = 0.01  # of a peak, from 0 and 1, before its logit
_TINY = 1e-6


class Found(NamedTuple):
    """What a lesion model finds in each of N slices, float [N].

    Attributes:
      lungs, lesions: areas, in any unit.
      peaks: highest lesion probability in the lungs; 0 without lungs.
    """

    lungs: np.ndarray
    lesions: np.ndarray
    peaks: np.ndarray

    def select(self, places: Sequence[int]) -> 'Found':
        """Returns what is found in some slices."""
        return Found(*(values[list(places)] for values in self))


class SickRule(NamedTuple):
    """A logistic of the features of `compute_features`: of the logarithms of the shares and the logit of the peaks.

    Attributes:
      weights: of the features.
      bias: added to their weighted sum.
    """

    weights: tuple[float, float, float]
    bias: float


def find_in_slices(probabilities_Nxhxhx3: np.ndarray, threshold: float) -> Found:
    """Returns what is found in slices without Hounsfield units; areas are in positions.

    The lungs are what the model calls lungs or lesion. For slices with Hounsfield units see `burden`.

    Args:
      probabilities_Nxhxhx3: of lungs, lesion and consolidation given lesion.
      threshold: of the lesion probability.
    """
    is_lesion = probabilities_Nxhxhx3[..., 1] >= threshold
    is_lungs = (probabilities_Nxhxhx3[..., 0] > 0.5) | is_lesion
    peaks = np.where(is_lungs, probabilities_Nxhxhx3[..., 1], 0).max((1, 2))
    return Found(*(values.astype(float) for values in (is_lungs.sum((1, 2)), is_lesion.sum((1, 2)), peaks)))


def compute_features(found: Found) -> np.ndarray:
    """Returns the features of a scan from what is found in its T slices, [3].

    They are the share of the lungs with lesions, of the scan and of the worst fifth of its slices, and the mean of the
    highest fifth of the peaks. Each fifth is taken of the slices that show lungs, and is at least one slice. A single
    slice has the same share twice; a scan without lungs has zeros. Small lesions below the threshold have no share, but
    a peak.
    """
    shown = found.select(np.flatnonzero(found.lungs))
    if not len(shown.lungs):
        return np.zeros(3)
    fifth = max(1, round(_WORST * len(shown.lungs)))
    shares, peaks = np.sort(shown.lesions / shown.lungs), np.sort(shown.peaks)
    return np.array([found.lesions.sum() / found.lungs.sum(), shares[-fifth:].mean(), peaks[-fifth:].mean()])


def fit_sick(features_Nx3: np.ndarray, is_sick_N: np.ndarray) -> SickRule:
    """Fits the logistic; sick and normal weigh the same.

    Raises:
      ValueError: all are sick, or none is.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    if is_sick_N.all() or not is_sick_N.any():
        raise ValueError('sick and normal examples are needed')
    fitted = LogisticRegression(class_weight='balanced').fit(_transform(features_Nx3), is_sick_N)
    return SickRule(tuple(fitted.coef_[0].tolist()), float(fitted.intercept_[0]))


def compute_sick(rule: SickRule, features_Nx3: np.ndarray) -> np.ndarray:
    """Returns the probability of sick [N], never 0 or 1, so that its logarithm is finite."""
    logits = _transform(features_Nx3) @ np.array(rule.weights) + rule.bias
    return np.clip(1 / (1 + np.exp(-logits)), _TINY, 1 - _TINY)


def _transform(features_Nx3: np.ndarray) -> np.ndarray:
    peaks_N = features_Nx3[:, 2]
    logits_N = np.log((peaks_N + _MARGIN) / (1 - peaks_N + _MARGIN))
    return np.column_stack([np.log(features_Nx3[:, :2] + _FLOOR), logits_N])


def parse_rule(saved: Mapping[str, Any]) -> SickRule:
    """Returns the rule that calibration.json holds.

    Raises:
      UserError: it is a rule of other features, saved by an earlier version.
    """
    rule = SickRule(tuple(saved['weights']), saved['bias'])
    if len(rule.weights) != 3:
        raise UserError(
            'calibration.json has a rule of sick or not by an earlier version: repeat `covidjax evaluate` of this run'
        )
    return rule


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
