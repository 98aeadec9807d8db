"""Classification metrics with intervals resampled by patient.

Shapes: N examples, K classes, P patients, R resamples.
"""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 2000


def compute_scores(confusion: np.ndarray, *, undefined: float = 0.0) -> dict[str, np.ndarray]:
    """Computes the columns of the paper's Tables III and IV from confusion matrices [..., K, K].

    Returns:
      'precision', 'recall', 'f1' [..., K], their averages weighted by support 'weighted_precision' ... [...], and
      'accuracy' [...]. A ratio without cases is `undefined` (0 as in scikit-learn) and counts 0 in an average.
    """

    def divide(numerator, denominator):
        return np.divide(numerator, denominator, out=np.full(np.shape(denominator), undefined), where=denominator > 0)

    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(float)
    support, called = confusion.sum(-1), confusion.sum(-2)
    scores = {
        'precision': divide(hits, called),
        'recall': divide(hits, support),
        'f1': divide(2 * hits, support + called),
    }
    total = support.sum(-1)
    for name in ('precision', 'recall', 'f1'):
        scores[f'weighted_{name}'] = divide(np.nansum(scores[name] * support, -1), total)
    scores['accuracy'] = divide(hits.sum(-1), total)
    return scores


def group_by_patient(patients: Sequence[str]) -> np.ndarray:
    """Returns for each example the number 0 .. P-1 of its patient."""
    return np.unique(np.asarray(patients), return_inverse=True)[1]


def draw_resamples(num_patients: int, *, seed: int, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """Returns how often each patient is drawn in each bootstrap resample, int [R, P], rows summing to P."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), size=num_resamples)


def compute_interval(resampled: np.ndarray) -> list[float] | None:
    """Returns the percentile interval [low, high] of resampled values [R], leaving out NaN; None if all are."""
    defined = resampled[~np.isnan(resampled)]
    return [float(q) for q in np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])] if len(defined) else None


def compute_metrics(
    labels_N: np.ndarray, predicted_N: np.ndarray, patients: Sequence[str], classes: Sequence[str], *, seed: int = 0
) -> dict:
    """Computes confusion matrix, per-class and average scores, and their bootstrap intervals by patient.

    Whole patients are resampled, since slices of one patient are not independent.

    Args:
      labels_N, predicted_N: int, 0 .. K-1.
      patients: patient of each example.
      classes: K names.
      seed: of the resampling.

    Returns:
      A JSON-able dict: num_examples, num_patients, classes, confusion_matrix, per_class.<class>.{precision, recall, f1,
      support}, weighted_average.{precision, recall, f1}, accuracy, and `intervals` of the same form.
    """
    k = len(classes)
    groups = group_by_patient(patients)
    num_patients = int(groups.max()) + 1
    by_patient = np.zeros((num_patients, k, k), np.int64)
    np.add.at(by_patient, (groups, labels_N, predicted_N), 1)
    confusion = by_patient.sum(0)
    resamples_RxP = draw_resamples(num_patients, seed=seed)
    resampled = compute_scores(
        (resamples_RxP @ by_patient.reshape(num_patients, k * k)).reshape(-1, k, k), undefined=np.nan
    )
    point = compute_scores(confusion)

    def arrange(value):
        names = ('precision', 'recall', 'f1')
        return {
            'per_class': {c: {name: value(name, i) for name in names} for i, c in enumerate(classes)},
            'weighted_average': {name: value(f'weighted_{name}', ...) for name in names},
            'accuracy': value('accuracy', ...),
        }

    metrics = {
        'num_examples': len(labels_N),
        'num_patients': num_patients,
        'classes': list(classes),
        'confusion_matrix': confusion.tolist(),
        **arrange(lambda name, i: float(point[name][i])),
        'intervals': {
            'level': LEVEL,
            'method': f'bootstrap by patient, {NUM_RESAMPLES} resamples, percentiles',
            **arrange(lambda name, i: compute_interval(resampled[name][..., i] if i is not ... else resampled[name])),
        },
    }
    for i, name in enumerate(classes):
        metrics['per_class'][name]['support'] = int(confusion[i].sum())
    return metrics


def compute_auc(scores_P: np.ndarray, positive_P: np.ndarray, *, seed: int = 0) -> dict:
    """Computes the area under the ROC curve over patients, with its bootstrap interval.

    The AUC is the share of (positive, negative) pairs that the score orders rightly, ties counting half.

    Args:
      scores_P: one score per patient, higher for positives.
      positive_P: bool.
      seed: of the resampling.

    Returns:
      {'auc', 'interval', 'num_positive', 'num_negative'}; 'auc' and 'interval' are None where a class is missing.
    """
    positive, negative = scores_P[positive_P], scores_P[~positive_P]
    result = {'auc': None, 'interval': None, 'num_positive': len(positive), 'num_negative': len(negative)}
    if len(positive) and len(negative):
        ordered = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
        result['auc'] = float(ordered.mean())
        resamples = draw_resamples(len(scores_P), seed=seed)
        p, n = resamples[:, positive_P], resamples[:, ~positive_P]
        pairs = p.sum(1) * n.sum(1)
        right = np.einsum('rp,pn,rn->r', p, ordered, n, optimize=True)
        result['interval'] = compute_interval(right[pairs > 0] / pairs[pairs > 0])
    return result


def format_table(metrics: dict, *, unit: str) -> str:
    """Returns the scores in the form of the paper's Tables III and IV, with intervals; `unit` heads the counts."""

    def cell(value, interval):
        return f'{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]' if interval else f'{value:.3f} [-]'

    def line(name, scores, intervals):
        cells = [cell(scores[s], intervals[s]) for s in ('precision', 'recall', 'f1')]
        return f'{name:<18}' + ''.join(f'{cell:<24}' for cell in cells) + f'{scores.get("support", "")}'

    intervals = metrics['intervals']
    lines = [f'{"Class":<18}{"Precision":<24}{"Recall":<24}{"F1":<24}{unit}']
    lines += [line(c, metrics['per_class'][c], intervals['per_class'][c]) for c in metrics['classes']]
    lines.append(line('weighted average', metrics['weighted_average'], intervals['weighted_average']))
    lines.append(f'{"accuracy":<18}{cell(metrics["accuracy"], intervals["accuracy"])}')
    return '\n'.join(line.rstrip() for line in lines)
