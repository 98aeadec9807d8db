"""Pneumonia against COVID-19 with one answer per patient, so that slice counts cannot inflate the scores."""

from collections.abc import Sequence

import numpy as np

from covidjax.data.lists import CLASSES
from covidjax.evaluation.metrics import compute_ranking, compute_share_interval, format_score

PNEUMONIA, COVID19 = CLASSES.index('pneumonia'), CLASSES.index('covid19')


def compute_patient_scores(
    scores_NxK: np.ndarray, labels_N: np.ndarray, patients: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores each sick patient by their slices: above 0 for COVID-19, below 0 for pneumonia.

    Args:
      scores_NxK: probabilities, or any scores of which the largest is the prediction.
      labels_N: int labels of the slices; normal slices are ignored.
      patients: patient of each slice.

    Returns:
      For each of G sick patients the mean over slices of (score of COVID-19 - score of pneumonia) [G], whether it is
      COVID-19 [G], and the patient ID. A patient with slices of both classes appears twice.
    """
    sick = np.isin(labels_N, (PNEUMONIA, COVID19))
    groups, members = np.unique(
        np.array(
            [f'{label}/{patient}' for label, patient in zip(labels_N[sick], np.asarray(patients)[sick], strict=True)],
            dtype=str,
        ),
        return_inverse=True,
    )
    difference_N = scores_NxK[sick, COVID19] - scores_NxK[sick, PNEUMONIA]
    # Round, so that equal scores stay tied when sums are taken in another order.
    score_G = np.round(np.bincount(members, difference_N) / np.bincount(members), 12)
    names = [group.split('/', 1) for group in groups]
    return score_G, np.array([label == str(COVID19) for label, _ in names], bool), [patient for _, patient in names]


def compute_patient_level(
    scores_NxK: np.ndarray, labels_N: np.ndarray, patients: Sequence[str], *, seed: int = 0
) -> dict:
    """Computes accuracy and AUC of a classifier's mean slice scores per sick patient.

    A patient with a score above 0 is called COVID-19 (see `compute_patient_scores`).

    Args:
      scores_NxK, labels_N, patients: see `compute_patient_scores`.
      seed: of the resampling.

    Returns:
      {'accuracy', 'accuracy_interval', 'auc', 'auc_interval', 'num_pneumonia', 'num_covid19'}. Scores are None without
      sick patients, the AUC also without one of the two classes.
    """
    score_G, is_covid19_G, _ = compute_patient_scores(scores_NxK, labels_N, patients)
    if not len(score_G):
        return dict.fromkeys(('accuracy', 'accuracy_interval', 'auc', 'auc_interval'), None) | {
            'num_pneumonia': 0,
            'num_covid19': 0,
        }
    right_G = (score_G > 0) == is_covid19_G
    each = np.arange(len(score_G))
    ranking = compute_ranking(score_G, is_covid19_G, each, seed=seed)
    return {
        'accuracy': float(right_G.mean()),
        'accuracy_interval': compute_share_interval(right_G, each, seed=seed),
        'auc': ranking['auc'],
        'auc_interval': ranking['auc_interval'],
        'num_pneumonia': ranking['num_negative'],
        'num_covid19': ranking['num_positive'],
    }


def format_comparison(by_name: dict[str, dict]) -> str:
    """Returns a table of `compute_patient_level` results, one row per classifier."""
    first = next(iter(by_name.values()))
    lines = [
        f'Pneumonia ({first["num_pneumonia"]}) against COVID-19 ({first["num_covid19"]}), per patient',
        f'{"":<18}{"Accuracy":<24}AUC',
    ]
    for name, r in by_name.items():
        accuracy, auc = (format_score(r[score], r[f'{score}_interval']) for score in ('accuracy', 'auc'))
        lines.append(f'{name:<18}{accuracy:<24}{auc}')
    return '\n'.join(lines)
