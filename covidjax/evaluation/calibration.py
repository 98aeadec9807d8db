"""Calibration: temperature scaling, reliability, and correction to other class shares.

Shapes: N examples, K classes, P patients, R resamples.
"""

from collections.abc import Sequence

import numpy as np
import scipy

from covidjax.evaluation.metrics import compute_interval, draw_resamples, group_by_patient
from covidjax.evaluation.predictions import softmax

NUM_BINS = 15
TEMPERATURES = (0.05, 20.0)


def fit_temperature(logits_NxK: np.ndarray, labels_N: np.ndarray) -> float:
    """Fits the temperature T of softmax(logits / T) by maximum likelihood (Guo et al. 2017, arXiv:1706.04599).

    The targets are smoothed as in Platt (1999): (N + 1) / (N + K) for the true class, 1 / (N + K) for each other one.
    Without smoothing, N correct predictions would give T = 0, a certainty that no finite sample supports.

    Args:
      logits_NxK: of examples that the model was not trained on.
      labels_N: int, 0 .. K-1.

    Returns:
      T, within `TEMPERATURES`; above 1 it makes predictions less certain.

    Raises:
      ValueError: there are no examples.
    """
    if not len(labels_N):
        raise ValueError('fitting a temperature needs examples, got none')
    n, k = logits_NxK.shape
    logits = logits_NxK.astype(np.float64)
    target = (logits[np.arange(n), labels_N] * n + logits.sum(1)) / (n + k)  # the targets' mean logit

    def compute_nll(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float(np.mean(scipy.special.logsumexp(inverse * logits, axis=1) - inverse * target))

    found = scipy.optimize.minimize_scalar(
        compute_nll, bounds=np.log(TEMPERATURES), method='bounded', options={'xatol': 1e-6}
    )
    return float(np.exp(found.x))


def apply_temperature(logits_NxK: np.ndarray, temperature: float) -> np.ndarray:
    """Returns softmax(logits / temperature), float64 [N, K]."""
    return softmax(logits_NxK.astype(np.float64) / temperature)


def compute_calibration(probabilities_NxK: np.ndarray, labels_N: np.ndarray) -> dict:
    """Computes calibration scores and reliability bins; the confidence of an example is its highest probability.

    Args:
      probabilities_NxK: rows summing to 1.
      labels_N: int, 0 .. K-1.

    Returns:
      A JSON-able dict: 'ece', the mean over examples of |accuracy - confidence| of their bin; 'brier', the mean over
      examples of the squared error summed over classes, 0 .. 2; 'nll' in nats, with probabilities of at least the
      float64 epsilon; 'bins' of equal width, {low, high, confidence, accuracy, count}. All bins but the first exclude
      their lower edge. Their confidence and accuracy are means, None if empty. Without examples the scores are None.
    """
    n = len(labels_N)
    confidence, right = probabilities_NxK.max(1), probabilities_NxK.argmax(1) == labels_N
    edges = np.linspace(0, 1, NUM_BINS + 1)
    bins = np.clip(np.searchsorted(edges, confidence) - 1, 0, NUM_BINS - 1)
    counts, confidences, hits = (np.bincount(bins, w, NUM_BINS) for w in (np.ones(n), confidence, right))
    true = probabilities_NxK[np.arange(n), labels_N]
    return {
        'ece': float(np.abs(hits - confidences).sum() / n) if n else None,
        'brier': float(compute_brier(probabilities_NxK, labels_N).mean()) if n else None,
        'nll': float(-np.log(np.maximum(true, np.finfo(np.float64).eps)).mean()) if n else None,
        'bins': [
            {
                'low': float(edges[b]),
                'high': float(edges[b + 1]),
                'confidence': float(confidences[b] / counts[b]) if counts[b] else None,
                'accuracy': float(hits[b] / counts[b]) if counts[b] else None,
                'count': int(counts[b]),
            }
            for b in range(NUM_BINS)
        ],
    }


def compute_brier(probabilities_NxK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Returns the squared error of each example, summed over classes: [N], 0 .. 2."""
    return ((probabilities_NxK - np.eye(probabilities_NxK.shape[1])[labels_N]) ** 2).sum(1)


def correct_prior(
    probabilities_NxK: np.ndarray, from_shares_K: Sequence[float], to_shares_K: Sequence[float]
) -> np.ndarray:
    """Adapts probabilities to other class shares (Saerens et al. 2002), [N, K].

    p'(c|x) is proportional to p(c|x) * to_c / from_c. This assumes that a class looks the same under both shares.

    Raises:
      ValueError: a share is not positive.
    """
    if min(*from_shares_K, *to_shares_K) <= 0:
        raise ValueError(f'shares must be positive, got {list(from_shares_K)} and {list(to_shares_K)}')
    products = probabilities_NxK * (np.asarray(to_shares_K, float) / np.asarray(from_shares_K, float))
    return products / products.sum(1, keepdims=True)


def compute_prior_correction(
    probabilities_NxK: np.ndarray,
    labels_N: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    train_shares_K: Sequence[float],
    to_shares_K: Sequence[float],
    seed: int = 0,
) -> dict:
    """Estimates what `correct_prior` gains under other class shares, by weighting each class to its share.

    The correction starts from equal shares, not from those of the training list. The loss weights an example of class c
    by min(count) / count_c (see `training.losses`), so all classes have the same total weight and the model learns
    p(c|x) of a population with equal shares. Temperature scaling favours no class and does not change this.

    Args:
      probabilities_NxK: of test examples.
      labels_N: int, 0 .. K-1.
      patients: patient of each example.
      classes: K names.
      train_shares_K: class shares of the training list; only reported.
      to_shares_K: class shares to correct to.
      seed: of the resampling.

    Returns:
      A JSON-able dict: 'train_shares', 'from_shares' and 'to_shares' by class; 'before' and 'after', each {accuracy,
      accuracy_interval, balanced_accuracy, balanced_accuracy_interval, brier, brier_interval}, intervals by patient.
      If a class has no examples, 'before' and 'after' are None and a 'note' names the class.
    """
    k = len(classes)
    from_shares = np.full(k, 1 / k)
    shares = {'train_shares': train_shares_K, 'from_shares': from_shares, 'to_shares': to_shares_K}
    result = {
        name: {c: float(share) for c, share in zip(classes, values, strict=True)} for name, values in shares.items()
    } | {'before': None, 'after': None}
    support = np.bincount(labels_N, minlength=k)
    if not support.all():
        missing = ', '.join(c for c, count in zip(classes, support, strict=True) if not count)
        return result | {'note': f'No example is {missing}: other class shares cannot be imitated.'}

    groups = group_by_patient(patients)
    num_patients = groups.max() + 1
    weights_RxP = np.concatenate([np.ones((1, num_patients), int), draw_resamples(num_patients, seed=seed)])

    def average_by_class(values_N: np.ndarray) -> np.ndarray:
        """Returns the mean of each class under each weighting [R, K]; NaN where a class has no weight."""
        cells = groups * k + labels_N
        sums, counts = (
            weights_RxP @ np.bincount(cells, w, num_patients * k).reshape(num_patients, k) for w in (values_N, None)
        )
        return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)

    def evaluate(probabilities: np.ndarray) -> dict:
        right = average_by_class((probabilities.argmax(1) == labels_N).astype(float))
        brier = average_by_class(compute_brier(probabilities, labels_N))
        values_R = {
            'accuracy': right @ np.asarray(to_shares_K),
            'balanced_accuracy': right.mean(1),
            'brier': brier @ np.asarray(to_shares_K),
        }
        return {name: float(values[0]) for name, values in values_R.items()} | {
            f'{name}_interval': compute_interval(values[1:]) for name, values in values_R.items()
        }

    return result | {
        'before': evaluate(probabilities_NxK),
        'after': evaluate(correct_prior(probabilities_NxK, from_shares, to_shares_K)),
    }
