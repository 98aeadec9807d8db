"""ROC and precision-recall curves of each class against the others.

Shapes: N examples, K classes, P patients, T points of a curve.
"""

from collections.abc import Sequence

import numpy as np

from covidjax.evaluation.metrics import (
    compute_interval,
    compute_ranking_scores,
    draw_resamples,
    group_by_patient,
)

MAX_POINTS = 200


def compute_curves(
    labels_N: np.ndarray,
    probabilities_NxK: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    seed: int = 0,
) -> dict:
    """Computes ROC and precision-recall curves, their areas and bootstrap intervals by patient.

    Args:
      labels_N: int, 0 .. K-1.
      probabilities_NxK: or any scores, higher for the class.
      patients: patient of each example.
      classes: K names.
      seed: of the resampling; all classes share the resamples.

    Returns:
      A JSON-able dict: per_class.<class>.{roc.{fpr, tpr}, auc, auc_interval, precision_recall.{recall, precision},
      average_precision, average_precision_interval, num_positive, num_negative}, macro_auc, macro_auc_interval,
      macro_average_precision and macro_average_precision_interval. Curves have at most `MAX_POINTS` points; recall
      rises from 0, where the precision is 1 by convention. A class without positives or without negatives has None for
      curves and scores, and a 'note'. The macro scores then average the other classes, and a 'note' beside them lists
      those left out.
    """
    groups = group_by_patient(patients)
    num_patients = groups.max(initial=-1) + 1
    weights = np.concatenate([np.ones((1, num_patients), int), draw_resamples(num_patients, seed=seed)])
    per_class, values = {}, {'auc': [], 'average_precision': []}
    for i, name in enumerate(classes):
        positive, scores = labels_N == i, probabilities_NxK[:, i]
        num_positive = int(positive.sum())
        result = {
            **dict.fromkeys(
                (
                    'roc',
                    'auc',
                    'auc_interval',
                    'precision_recall',
                    'average_precision',
                    'average_precision_interval',
                )
            ),
            'num_positive': num_positive,
            'num_negative': len(positive) - num_positive,
        }
        if 0 < num_positive < len(positive):
            for key, value in compute_ranking_scores(scores, positive, groups, weights).items():
                result |= {key: float(value[0]), f'{key}_interval': compute_interval(value[1:])}
                values[key].append(value)
            result |= _draw_curves(positive, scores)
        else:
            result['note'] = f'No example is {name}.' if not num_positive else f'Every example is {name}.'
        per_class[name] = result

    curves = {'per_class': per_class}
    for key, of_classes in values.items():
        macro = np.mean(of_classes, axis=0) if of_classes else None
        curves[f'macro_{key}'] = None if macro is None else float(macro[0])
        curves[f'macro_{key}_interval'] = None if macro is None else compute_interval(macro[1:])
    missing = [name for name, result in per_class.items() if 'note' in result]
    if missing:
        curves['note'] = f'The macro averages leave out {", ".join(missing)}.'
    return curves


def _draw_curves(positive: np.ndarray, scores: np.ndarray) -> dict[str, dict[str, list[float]]]:
    from sklearn.metrics import precision_recall_curve, roc_curve  # slow to import

    fpr, tpr, _ = roc_curve(positive, scores)
    precision, recall, _ = precision_recall_curve(positive, scores)
    precision, recall = precision[::-1], recall[::-1]
    roc_points, points = thin(fpr + tpr), thin(recall)
    return {
        'roc': {'fpr': fpr[roc_points].tolist(), 'tpr': tpr[roc_points].tolist()},
        'precision_recall': {'recall': recall[points].tolist(), 'precision': precision[points].tolist()},
    }


def thin(position_T: np.ndarray, max_points: int = MAX_POINTS) -> np.ndarray:
    """Returns the indices of at most `max_points` points of a curve, evenly spaced along it, including both ends.

    Args:
      position_T: position of each point along the curve, not falling.
      max_points: at least 2.
    """
    if len(position_T) <= max_points:
        return np.arange(len(position_T))
    even = np.linspace(position_T[0], position_T[-1], max_points)
    chosen = np.searchsorted(position_T, even)
    chosen[0], chosen[-1] = 0, len(position_T) - 1
    return np.unique(chosen)
