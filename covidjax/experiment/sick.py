"""Lesions of a dataset's slices, and the rule by which they tell sick from normal."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np

from covidjax.data import covidx_ct, lists, preprocess
from covidjax.data.sequences import Scan, group_scans
from covidjax.evaluation.metrics import compute_ranking, compute_share_interval
from covidjax.evaluation.outlines import outline_slices
from covidjax.evaluation.sick import SickRule, compute_features, compute_sick, count_areas, fit_sick, join
from covidjax.models.lesion_weights import LesionModel
from covidjax.progress import track

NORMAL = lists.CLASSES.index('normal')
_AT_ONCE = 256  # slices that are read together


class Areas(NamedTuple):
    """Areas of the lungs and of the lesions in the N slices of a split, float [N]."""

    lungs: np.ndarray
    lesions: np.ndarray

    def select(self, places: Sequence[int]) -> 'Areas':
        """Returns the areas of some slices."""
        return Areas(self.lungs[list(places)], self.lesions[list(places)])


# Areas (lungs, lesions) by model and raw directory, and by file: a cross-validation asks for most of them twice.
_MEASURED: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}


def measure_split(lesions: LesionModel, data: covidx_ct.Prepared, split: str) -> Areas:
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
        areas = count_areas(outline_slices(lesions, np.stack(slices)), lesions.threshold)
        known.update(zip(files, zip(*(of_kind.tolist() for of_kind in areas), strict=True), strict=True))
    found = np.array([known[row.file] for row in rows]).reshape(-1, 2)
    return Areas(found[:, 0], found[:, 1])


def compute_slice_sick(rule: SickRule, areas: Areas) -> np.ndarray:
    """Returns the probability of sick of every slice on its own, [N]."""
    pairs = zip(*areas, strict=True)
    return compute_sick(rule, np.stack([compute_features(np.array([a]), np.array([b])) for a, b in pairs]))


class Judge:
    """Tells sick from normal by the lesions of the slices of a dataset; outlines a split when it is first asked for.

    Args:
      lesions: the model of lesions.
      data: the dataset; the rule is fitted on its training scans.
    """

    def __init__(self, lesions: LesionModel, data: covidx_ct.Prepared):
        self.lesions, self._data, self._areas = lesions, data, {}

    def get_areas(self, split: str) -> Areas:
        """Returns the areas in the slices of a split."""
        if split not in self._areas:
            self._areas[split] = measure_split(self.lesions, self._data, split)
        return self._areas[split]

    @functools.cached_property
    def rule(self) -> SickRule:
        """The rule, fitted on the training scans with all their slices; many scans may have a single one."""
        scans = group_scans(self._data.rows['train'])
        is_sick = np.array([scan.label != NORMAL for scan in scans])
        return fit_sick(self._compute_features(scans, 'train'), is_sick)

    def compute_slice_sick(self, split: str) -> np.ndarray:
        """Returns the probability of sick of every slice on its own, [N]."""
        return compute_slice_sick(self.rule, self.get_areas(split))

    def compute_scan_sick(self, scans: Sequence[Scan], split: str) -> np.ndarray:
        """Returns the probability of sick of every scan, [N]."""
        return compute_sick(self.rule, self._compute_features(scans, split))

    def _compute_features(self, scans: Sequence[Scan], split: str) -> np.ndarray:
        areas = self.get_areas(split)
        return np.stack([compute_features(*areas.select(scan.records)) for scan in scans])

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
