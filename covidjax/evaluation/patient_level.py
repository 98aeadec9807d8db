"""Pneumonia against COVID-19, one answer per patient: the comparison that slice counts cannot inflate."""

from collections.abc import Sequence

import numpy as np

from covidjax.data.lists import CLASSES
from covidjax.evaluation.metrics import compute_interval, compute_ranking, draw_resamples

PNEUMONIA, COVID19 = CLASSES.index('pneumonia'), CLASSES.index('covid19')


def compute_patient_level(
    scores_NxK: np.ndarray, labels_N: np.ndarray, patients: Sequence[str], *, seed: int = 0
) -> dict:
    """Compares a classifier's mean slice scores per sick patient with the truth.

    A patient's score is the mean over the slices of (score of COVID-19 - score of pneumonia); above 0 is called
    COVID-19. Normal slices take no part.

    Args:
      scores_NxK: probabilities, or any scores of which the largest is the prediction.
      labels_N: int labels of the slices.
      patients: patient of each slice.
      seed: of the resampling.

    Returns:
      {'accuracy', 'accuracy_interval', 'auc', 'auc_interval', 'num_pneumonia', 'num_covid19'}, None where the test
      split has no such patients.
    """
    sick = np.isin(labels_N, (PNEUMONIA, COVID19))
    groups, members = np.unique(
        np.array(
            [f'{label}/{patient}' for label, patient in zip(labels_N[sick], np.asarray(patients)[sick], strict=True)]
        ),
        return_inverse=True,
    )
    if not len(groups):
        return dict.fromkeys(('accuracy', 'accuracy_interval', 'auc', 'auc_interval'), None) | {
            'num_pneumonia': 0,
            'num_covid19': 0,
        }
    difference_N = scores_NxK[sick, COVID19] - scores_NxK[sick, PNEUMONIA]
    # Rounded, so that sums in another order leave equal scores tied.
    score_P = np.round(np.bincount(members, difference_N) / np.bincount(members), 12)
    is_covid19_P = np.array([group.startswith(f'{COVID19}/') for group in groups])
    right_P = (score_P > 0) == is_covid19_P
    ranking = compute_ranking(score_P, is_covid19_P, groups, seed=seed)
    resamples = draw_resamples(len(groups), seed=seed)
    return {
        'accuracy': float(right_P.mean()),
        'accuracy_interval': compute_interval(resamples @ right_P / len(groups)),
        'auc': ranking['auc'],
        'auc_interval': ranking['auc_interval'],
        'num_pneumonia': ranking['num_negative'],
        'num_covid19': ranking['num_positive'],
    }


def format_comparison(by_name: dict[str, dict]) -> str:
    """Returns a table of `compute_patient_level` results, a row per classifier."""

    def cell(value, interval):
        return '-' if value is None else f'{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]'

    first = next(iter(by_name.values()))
    lines = [
        f'Pneumonia ({first["num_pneumonia"]}) against COVID-19 ({first["num_covid19"]}), per patient',
        f'{"":<18}{"Accuracy":<24}AUC',
    ]
    for name, r in by_name.items():
        lines.append(f'{name:<18}{cell(r["accuracy"], r["accuracy_interval"]):<24}{cell(r["auc"], r["auc_interval"])}')
    return '\n'.join(lines)
