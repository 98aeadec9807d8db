"""Scan predictions from votes of a slice model, their calibration, and their comparison with a sequence model.

Shapes: M scans, T slices of a scan, N slices of all scans, K classes. T differs between scans.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from covidjax.data.lists import CLASSES
from covidjax.data.sequences import NUM_SLICES, Scan
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.metrics import compute_interval, compute_metrics, draw_resamples, group_by_patient
from covidjax.evaluation.screening import fit_rules
from covidjax.evaluation.sick import join_logits

TOP_K = (2, 3, 5, 8)
_TINY = 1e-12  # replaces a probability of 0 before the logarithm
RULES = ('mean', 'majority', 'max', *(f'top-{k}' for k in TOP_K))


def vote(slice_probabilities_TxK: np.ndarray, rule: str) -> np.ndarray:
    """Returns the scores of a scan per class [K]; the largest is its class.

    Rules: 'mean' of the probabilities; 'majority', the share of slices that each class wins (ties go to the higher
    mean); 'max' over the slices; 'top-k', the mean of the k highest per class, or of all if there are fewer.

    Raises:
      ValueError: the rule is unknown.
    """
    p = slice_probabilities_TxK
    if rule == 'mean':
        return p.mean(0)
    if rule == 'majority':
        wins = np.bincount(p.argmax(1), minlength=p.shape[1])
        # A mean is at most 1, so the mean breaks ties and never outweighs a slice.
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
    """Returns the rule with the best accuracy (of equal ones the first in RULES) and the accuracy of every rule.

    Pass validation scans only.
    """
    accuracies = {rule: float((vote_all(slice_probabilities, rule).argmax(1) == labels_M).mean()) for rule in RULES}
    return max(RULES, key=accuracies.__getitem__), accuracies


def compare_paired(
    first_M: np.ndarray, second_M: np.ndarray, labels_M: np.ndarray, patients: Sequence[str], *, seed: int = 0
) -> dict:
    """Compares two classifiers' predictions on the same scans.

    Returns:
      'difference' of the accuracies (first minus second) with its bootstrap 'interval' by patient; 'only_first' and
      'only_second', the numbers of scans that only one of them gets right; 'mcnemar_p', the two-sided exact
      binomial test of these numbers.
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
    """Returns which scans have slices called pneumonia and slices called COVID-19, bool [M]."""
    pneumonia, covid19 = CLASSES.index('pneumonia'), CLASSES.index('covid19')
    calls = [set(p.argmax(1).tolist()) for p in slice_probabilities]
    return np.array([{pneumonia, covid19} <= called for called in calls])


def compare_on_scans(
    chosen: Sequence[Scan],
    labels_M: np.ndarray,
    probabilities_MxK: np.ndarray,
    votes: dict[str, np.ndarray],
    rule: str,
    slice_probabilities: Sequence[np.ndarray],
) -> dict[str, Any]:
    """Compares the sequence model with the slice model's votes on the same scans.

    Args:
      chosen: the M scans.
      labels_M: their classes.
      probabilities_MxK: of the sequence model.
      votes: scores [M, K] for every rule.
      rule: the one chosen on validation scans.
      slice_probabilities: per scan [T, K].

    Returns:
      'sequence' and 'vote' (`compute_metrics`, the vote with its 'rule'), 'sequence_minus_vote' (`compare_paired`),
      'test_accuracy_of_rules'; 'conflicts' (`find_conflicts`) and 'short_scans' (fewer than 16 slices), each the number
      of such scans and how many the sequence model and each rule get right.
    """
    patients = [scan.patient for scan in chosen]
    predicted = {'sequence': probabilities_MxK.argmax(1), **{r: scores.argmax(1) for r, scores in votes.items()}}
    conflicts = find_conflicts(slice_probabilities)
    short = np.array([len(scan.records) < NUM_SLICES for scan in chosen])

    def count_right(subset):
        return {
            'num_scans': int(subset.sum()),
            'right': {name: int((p == labels_M)[subset].sum()) for name, p in predicted.items()},
        }

    return {
        'sequence': compute_metrics(labels_M, predicted['sequence'], patients, CLASSES),
        'vote': {'rule': rule, **compute_metrics(labels_M, predicted[rule], patients, CLASSES)},
        'sequence_minus_vote': compare_paired(predicted['sequence'], predicted[rule], labels_M, patients),
        'test_accuracy_of_rules': {r: float((predicted[r] == labels_M).mean()) for r in votes},
        'conflicts': count_right(conflicts),
        'short_scans': count_right(short),
    }


def fit_vote_rules(
    logits_NxK: np.ndarray, scans: Sequence[Scan], temperature: float, sick: np.ndarray | None = None
) -> dict[str, Any]:
    """Chooses the voting rule and fits the rules of `screening.fit_rules` to its votes.

    Args:
      logits_NxK: of the slices of a split that the model was not trained on.
      scans: of that split, with all their slices.
      temperature: of the slices.
      sick: probability of sick of every scan, which is joined with its votes (see `sick.join`); None uses the votes.

    Returns:
      The rules, with 'rule' and the 'validation_accuracy' of every rule.
    """
    slice_logits = [logits_NxK[list(scan.records)] for scan in scans]
    labels = np.array([scan.label for scan in scans])
    rule, accuracies = choose_rule([apply_temperature(x, temperature) for x in slice_logits], labels)
    votes = np.stack([compute_vote_logits(x, temperature, rule) for x in slice_logits])
    if sick is not None:
        votes = join_logits(sick, votes)
    rules = fit_rules(votes, labels, [scan.patient for scan in scans], CLASSES)
    return {'rule': rule, 'validation_accuracy': accuracies, **rules}


def compute_vote_logits(logits_TxK: np.ndarray, temperature: float, rule: str) -> np.ndarray:
    """Returns the logarithms of a scan's votes [K], which serve as the scan's logits."""
    return np.log(np.maximum(vote(apply_temperature(logits_TxK, temperature), rule), _TINY))
