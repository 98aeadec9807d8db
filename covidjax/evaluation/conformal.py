"""Selective prediction (which cases to leave to a radiologist): conformal sets and risk-coverage curves.

Shapes: N examples, K classes, P patients.
"""

from collections.abc import Sequence

import numpy as np

from covidjax.evaluation.curves import thin
from covidjax.evaluation.metrics import compute_share_interval

ACCURACY_AT = (0.5, 0.8, 0.9, 1.0)


def compute_rank(num_examples: int, coverage: float) -> int:
    """Returns the rank, from 1, of the threshold among ascending scores; above `num_examples` there are too few."""
    return int(np.ceil((num_examples + 1) * coverage - 1e-9))  # rounding makes 0.55 * 100 exceed 55


def fit_thresholds(probabilities_NxK: np.ndarray, labels_N: np.ndarray, coverage: float) -> np.ndarray:
    """Fits class-conditional split conformal prediction (Vovk 2012, arXiv:1209.2673) with the score 1 - p_c.

    The threshold of a class is the ceil((n + 1) * coverage)-th smallest score of the n examples of that class. If
    examples are exchangeable, the set of a new example contains its class with at least this probability. Slices of one
    patient are not independent: over slices of few patients coverage scatters more than over as many scans.

    Args:
      probabilities_NxK: of examples that the model was not trained on.
      labels_N: int, 0 .. K-1.
      coverage: in (0, 1).

    Returns:
      Thresholds [K]. A class with fewer than coverage / (1 - coverage) examples gets 1, which puts it in every set.

    Raises:
      ValueError: coverage is outside (0, 1).
    """
    if not 0 < coverage < 1:
        raise ValueError(f'coverage must be between 0 and 1, got {coverage}')
    thresholds = np.ones(probabilities_NxK.shape[1])
    for c in range(len(thresholds)):
        scores = np.sort(1 - probabilities_NxK[labels_N == c, c])
        rank = compute_rank(len(scores), coverage)
        if rank <= len(scores):
            thresholds[c] = scores[rank - 1]
    return thresholds


def predict_sets(probabilities_NxK: np.ndarray, thresholds_K: Sequence[float]) -> np.ndarray:
    """Returns which classes are in the prediction set of each example, bool [N, K]."""
    return 1 - probabilities_NxK <= np.asarray(thresholds_K)


def compute_conformal(
    probabilities_NxK: np.ndarray,
    labels_N: np.ndarray,
    patients: Sequence[str],
    thresholds_K: Sequence[float],
    classes: Sequence[str],
    *,
    seed: int = 0,
) -> dict:
    """Computes coverage and size of prediction sets.

    Args:
      probabilities_NxK: of test examples.
      labels_N: int, 0 .. K-1.
      patients: patient of each example.
      thresholds_K: see `fit_thresholds`.
      classes: K names.
      seed: of the resampling.

    Returns:
      A JSON-able dict: 'per_class'.<class>.{coverage, interval, num_examples}, intervals by patient (see
      `compute_share_interval`), None for a class without examples; 'mean_size' of the sets; the shares of 'single',
      'empty' and 'multiple' sets; 'single_accuracy', the share of single sets that hold the true class, None if no set
      is single. Without examples these are None as well.
    """
    sets = predict_sets(probabilities_NxK, thresholds_K)
    sizes, covered = sets.sum(1), sets[np.arange(len(labels_N)), labels_N]
    patients, per_class = np.asarray(patients), {}
    for c, name in enumerate(classes):
        members = labels_N == c
        per_class[name] = {
            'coverage': _mean(covered[members]),
            'interval': compute_share_interval(covered[members], patients[members], seed=seed),
            'num_examples': int(members.sum()),
        }
    return {
        'per_class': per_class,
        'mean_size': _mean(sizes),
        'single': _mean(sizes == 1),
        'empty': _mean(sizes == 0),
        'multiple': _mean(sizes > 1),
        'single_accuracy': _mean(covered[sizes == 1]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def compute_risk_coverage(probabilities_NxK: np.ndarray, labels_N: np.ndarray) -> dict:
    """Computes the error rate of the most confident examples as a function of their share, the coverage.

    Args:
      probabilities_NxK: confidence is the highest of a row. Equally confident examples share their errors evenly, which
        is the average over all their orders.
      labels_N: int, 0 .. K-1.

    Returns:
      A JSON-able dict: 'coverage' and 'risk', at most 200 points; 'aurc', the mean risk over all coverages (Geifman et
      al. 2019, arXiv:1805.08206); 'accuracy_at', by coverage as a string. Lists are empty and numbers None without
      examples.
    """
    n = len(labels_N)
    if not n:
        return {'coverage': [], 'risk': [], 'aurc': None, 'accuracy_at': {str(c): None for c in ACCURACY_AT}}
    wrong = probabilities_NxK.argmax(1) != labels_N
    ties = np.unique(-probabilities_NxK.max(1), return_inverse=True)[1]
    errors = (np.bincount(ties, wrong) / np.bincount(ties))[np.sort(ties)]  # expected error at each rank
    answered = np.arange(1, n + 1)
    risk = np.cumsum(errors) / answered
    points = thin(answered)
    return {
        'coverage': (answered[points] / n).tolist(),
        'risk': risk[points].tolist(),
        'aurc': float(risk.mean()),
        'accuracy_at': {str(c): float(1 - risk[int(np.ceil(c * n - 1e-9)) - 1]) for c in ACCURACY_AT},
    }
