"""Lesions of a dataset's slices, and the rule by which they tell sick from normal."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from covidjax.data import covidx_ct, lists, preprocess
from covidjax.data.sequences import Scan, group_scans
from covidjax.evaluation.metrics import compute_ranking, compute_share_interval
from covidjax.evaluation.outlines import outline_slices
from covidjax.evaluation.sick import Found, SickRule, compute_features, compute_sick, find_in_slices, fit_sick, join
from covidjax.models.lesion_weights import LesionModel
from covidjax.progress import track

NORMAL = lists.CLASSES.index('normal')
_AT_ONCE = 256  # slices that are read together

# What is found, by model and raw directory, and by file: a cross-validation asks for most of it twice.
_MEASURED: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}


def measure_split(lesions: LesionModel, data: covidx_ct.Prepared, split: str) -> Found:
    """Outlines the whole slices of a split, as their images are, not as the classifier sees them.

    A process outlines a slice once by each model.
    """
    images, rows = lists.find_images(data.raw_dir, data.version), data.rows[split]
    known = _MEASURED.setdefault((lesions.digest, str(data.raw_dir)), {})
    new = [row.file for row in rows if row.file not in known]
    starts = range(0, len(new), _AT_ONCE)
    for start in track(starts, f'lesions of {split}', len(starts), 'part'):
        files = new[start : start + _AT_ONCE]
        load = joblib.delayed(preprocess.load_slice)
        slices = joblib.Parallel(n_jobs=-1, prefer='threads')(
            load(str(Path(images) / file), None, lesions.image_size) for file in files
        )
        found = find_in_slices(outline_slices(lesions, np.stack(slices)), lesions.threshold)
        known.update(zip(files, zip(*(values.tolist() for values in found), strict=True), strict=True))
    return Found(*np.array([known[row.file] for row in rows]).reshape(-1, 3).T)


def compute_slice_sick(rule: SickRule, found: Found) -> np.ndarray:
    """Returns the probability of sick of every slice on its own, [N]."""
    return compute_sick(rule, np.stack([compute_features(found.select([place])) for place in range(len(found.lungs))]))


class Judge:
    """Tells sick from normal by the lesions of the slices of a dataset; outlines a split when it is first asked for.

    Args:
      lesions: the model of lesions.
      data: the dataset; the rule is fitted on its training scans.
    """

    def __init__(self, lesions: LesionModel, data: covidx_ct.Prepared):
        self.lesions, self._data, self._found = lesions, data, {}

    def _find(self, split: str) -> Found:
        if split not in self._found:
            self._found[split] = measure_split(self.lesions, self._data, split)
        return self._found[split]

    @functools.cached_property
    def rule(self) -> SickRule:
        """The rule, fitted on the training scans with all their slices; many scans may have a single one."""
        scans = group_scans(self._data.rows['train'])
        is_sick = np.array([scan.label != NORMAL for scan in scans])
        return fit_sick(self._compute_features(scans, 'train'), is_sick)

    def compute_slice_sick(self, split: str) -> np.ndarray:
        """Returns the probability of sick of every slice on its own, [N]."""
        return compute_slice_sick(self.rule, self._find(split))

    def compute_scan_sick(self, scans: Sequence[Scan], split: str) -> np.ndarray:
        """Returns the probability of sick of every scan, [N]."""
        return compute_sick(self.rule, self._compute_features(scans, split))

    def _compute_features(self, scans: Sequence[Scan], split: str) -> np.ndarray:
        found = self._find(split)
        return np.stack([compute_features(found.select(scan.records)) for scan in scans])

    def describe(self) -> dict[str, Any]:
        """Returns what calibration.json stores of the rule."""
        return {
            'lesions': self.lesions.name,
            'digest': self.lesions.digest,
            'threshold': self.lesions.threshold,
            **self.rule._asdict(),
        }


def compare_verdicts(
    labels_N: np.ndarray, patients: Sequence[str], classifier_NxK: np.ndarray, sick_N: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Compares the classifier alone, the lesions alone and both.

    Args:
      labels_N: true classes.
      patients: of the examples.
      classifier_NxK: probabilities of the classifier.
      sick_N: probability of sick by the lesions.

    Returns:
      By verdict: 'sick_auc' with 'interval', area under the ROC curve of sick against normal (None without both);
      'accuracy' of the three classes with 'accuracy_interval' (not for the lesions alone, which know no classes).
    """
    joined_NxK = join(sick_N, classifier_NxK)
    scores = {'classifier': 1 - classifier_NxK[:, NORMAL], 'lesions': sick_N, 'both': 1 - joined_NxK[:, NORMAL]}
    compared = {}
    for name, score in scores.items():
        found = compute_ranking(score, labels_N != NORMAL, patients)
        compared[name] = {'sick_auc': found['auc'], 'interval': found['auc_interval']}
    for name, probabilities in (('classifier', classifier_NxK), ('both', joined_NxK)):
        is_right = probabilities.argmax(1) == labels_N
        interval = compute_share_interval(is_right, patients)
        compared[name] |= {'accuracy': float(is_right.mean()), 'accuracy_interval': interval}
    return compared
