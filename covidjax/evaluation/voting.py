"""From slices to scans: votes of a slice model, and their comparison with a sequence model on the same scans.

Shapes: M scans, T slices of a scan, K classes. Slice probabilities of a scan are [T, K], T differing between scans.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats

from covidjax.data.lists import CLASSES
from covidjax.evaluation.metrics import compute_interval, draw_resamples, group_by_patient

TOP_K = (2, 3, 5, 8)
RULES = ('mean', 'majority', 'max', *(f'top-{k}' for k in TOP_K))


def vote(slice_probabilities_TxK: np.ndarray, rule: str) -> np.ndarray:
    """Returns the scores of a scan per class [K]; the largest is its class.

    Rules: 'mean' of the probabilities; 'majority', the share of slices that each class wins (ties fall to the higher
    mean); 'max' over the slices; 'top-k', the mean of the k highest per class, of all where there are fewer.
    """
    p = slice_probabilities_TxK
    if rule == 'mean':
        return p.mean(0)
    if rule == 'majority':
        wins = np.bincount(p.argmax(1), minlength=p.shape[1])
        # A mean is at most 1: this moves no class past one with more slices.
        return (wins + 0.5 * p.mean(0)) / (len(p) + 0.5)
    if rule == 'max':
        return p.max(0)
    if rule.startswith('top-'):
        return np.sort(p, axis=0)[-int(rule.removeprefix('top-')) :].mean(0)
    raise ValueError(f'rule must be one of {RULES}, got {rule!r}')


def vote_all(slice_probabilities: Sequence[np.ndarray], rule: str) -> np.ndarray:
    """Returns the scores of all scans [M, K]."""
    return np.stack([vote(p, rule) for p in slice_probabilities])


def choose_rule(slice_probabilities: Sequence[np.ndarray], labels_M: np.ndarray) -> tuple[str, dict[str, float]]:
    """Returns the rule of the best accuracy (the first in RULES of equal ones) and the accuracy of every rule.

    Call it with validation scans only.
    """
    accuracies = {rule: float((vote_all(slice_probabilities, rule).argmax(1) == labels_M).mean()) for rule in RULES}
    return max(RULES, key=accuracies.__getitem__), accuracies


def compare_paired(
    first_M: np.ndarray, second_M: np.ndarray, labels_M: np.ndarray, patients: Sequence[str], *, seed: int = 0
) -> dict:
    """Compares two classifiers' predictions on the same scans.

    Returns:
      'difference' of the accuracies (first less second) with its bootstrap 'interval' by patient, the numbers of scans
      that 'only_first' and 'only_second' gets right, and 'mcnemar_p', the two-sided exact binomial test on these.
    """
    first_right, second_right = first_M == labels_M, second_M == labels_M
    groups = group_by_patient(patients)
    num_patients = int(groups.max()) + 1
    gain_P = np.bincount(groups, first_right.astype(float) - second_right, minlength=num_patients)
    scans_P = np.bincount(groups, minlength=num_patients)
    resamples = draw_resamples(num_patients, seed=seed)
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    discordant = only_first + only_second
    return {
        'difference': float(first_right.mean() - second_right.mean()),
        'interval': compute_interval(resamples @ gain_P / (resamples @ scans_P)),
        'only_first': only_first,
        'only_second': only_second,
        'mcnemar_p': float(scipy.stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0,
    }


def find_conflicts(slice_probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """Returns bool [M]: some slice of the scan is called pneumonia and another one COVID-19."""
    pneumonia, covid19 = CLASSES.index('pneumonia'), CLASSES.index('covid19')
    calls = [set(p.argmax(1).tolist()) for p in slice_probabilities]
    return np.array([{pneumonia, covid19} <= called for called in calls])
