"""Lesions of a dataset's slices, the rule by which they tell sick from normal, and what runs report of both.

Shapes: N slices or scans, K classes.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np

from covidjax.data import covidx_ct, lists, preprocess
from covidjax.data.sequences import Scan, group_scans
from covidjax.errors import UserError
from covidjax.evaluation.metrics import compute_ranking, compute_share_interval, format_score
from covidjax.evaluation.outlines import outline_slices
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.sick import Found, SickRule, compute_features, compute_sick, find_in_slices, fit_sick, join
from covidjax.experiment.common import Example
from covidjax.experiment.lesions import load_lesions
from covidjax.models.lesion_weights import LesionModel
from covidjax.progress import track

NORMAL = lists.CLASSES.index('normal')
_AT_ONCE = 256  # slices that are read together

# What is found, by model and raw directory, and by file: a cross-validation asks for most of it twice.
_MEASURED: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}


class Verdicts(Protocol):
    """Outputs of a model for a split; see `common.Predictions`."""

    classifier: np.ndarray
    sick: np.ndarray


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


def compute_scan_sick(rule: SickRule, found: Found, scans: Sequence[Scan]) -> np.ndarray:
    """Returns the probability of sick of every scan, [N]; `scans` have all their slices."""
    return compute_sick(rule, _compute_scan_features(found, scans))


def _compute_scan_features(found: Found, scans: Sequence[Scan]) -> np.ndarray:
    return np.stack([compute_features(found.select(scan.records)) for scan in scans])


def check_both(rows: Sequence[lists.Row]) -> None:
    """Checks that a training list has sick and normal slices.

    Raises:
      UserError: it has not.
    """
    if len({row.label == NORMAL for row in rows}) < 2:
        raise UserError(
            'config.lesions needs sick and normal training scans, to learn which share of lesions is sick, and the '
            'training list does not have both: add the other, or leave config.lesions out'
        )


class Judge:
    """Tells sick from normal by the lesions of the slices of a dataset; outlines a split when it is first asked for.

    Args:
      lesions: the model of lesions.
      data: the dataset; the rule is fitted on its training scans.

    Raises:
      UserError: all training scans are sick, or none is.
    """

    def __init__(self, lesions: LesionModel, data: covidx_ct.Prepared):
        check_both(data.rows['train'])
        self.lesions, self._data, self._found = lesions, data, {}

    def get_found(self, split: str) -> Found:
        """Returns what is found in the slices of a split."""
        if split not in self._found:
            self._found[split] = measure_split(self.lesions, self._data, split)
        return self._found[split]

    @functools.cached_property
    def rule(self) -> SickRule:
        """The rule, fitted on the training scans with all their slices; many scans may have a single one."""
        scans = group_scans(self._data.rows['train'])
        is_sick = np.array([scan.label != NORMAL for scan in scans])
        return fit_sick(_compute_scan_features(self.get_found('train'), scans), is_sick)

    def compute_slice_sick(self, split: str) -> np.ndarray:
        """Returns the probability of sick of every slice on its own, [N]."""
        return compute_slice_sick(self.rule, self.get_found(split))

    def compute_scan_sick(self, scans: Sequence[Scan], split: str) -> np.ndarray:
        """Returns the probability of sick of every scan, [N]; `scans` have all their slices."""
        return compute_scan_sick(self.rule, self.get_found(split), scans)

    def describe(self, classifier_temperature: float) -> dict[str, Any]:
        """Returns the part `sick` of calibration.json, given the temperature of the classifier's own logits."""
        return {
            'lesions': self.lesions.name,
            'digest': self.lesions.digest,
            'threshold': self.lesions.threshold,
            **self.rule._asdict(),
            'classifier_temperature': classifier_temperature,
        }


def load_configured(name: str) -> LesionModel:
    """Loads the lesion model that `config.lesions` names.

    Raises:
      UserError: there is no such model; names the field.
    """
    try:
        return load_lesions(name)
    except UserError as error:
        raise UserError(f'config.lesions={name}: {error}') from error


def create_judge(name: str, data: covidx_ct.Prepared) -> Judge | None:
    """Returns the judge of a run, None without a lesion model.

    Args:
      name: `config.lesions`.
      data: of the run.

    Raises:
      UserError: there is no such model, or the rule can't be fitted on these data.
    """
    return Judge(load_configured(name), data) if name else None


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


def compare_splits(
    examples: Mapping[str, Sequence[Example]], predictions: Mapping[str, Verdicts]
) -> dict[str, dict[str, Any]]:
    """Returns `verdicts` of results.json: `compare_verdicts` by split.

    Args:
      examples: by split.
      predictions: by split, in the same order.
    """
    compared = {}
    for split, found in predictions.items():
        labels, patients = zip(*((one.label, one.patient) for one in examples[split]), strict=True)
        compared[split] = compare_verdicts(np.array(labels), patients, softmax(found.classifier), found.sick)
    return compared


def create_columns(predictions: Verdicts) -> dict[str, np.ndarray]:
    """Returns columns of predictions.csv: the classifier alone, not calibrated, and the probability of sick."""
    alone = softmax(predictions.classifier).T
    return {
        **{f'classifier_{name}': p for name, p in zip(lists.CLASSES, alone, strict=True)},
        'sick': predictions.sick,
    }


def format_verdicts(verdicts: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a summary that compare classifier, lesions and both."""
    lines = ['', 'Lesions decide on sick or not, the classifier on which disease']
    for split, compared in verdicts.items():
        for name, found in compared.items():
            auc = format_score(found['sick_auc'], found['interval'])
            accuracy = format_score(found.get('accuracy'), found.get('accuracy_interval'))
            lines.append(f'{split:<5}{name:<11}AUC of sick {auc:<21}  accuracy of three classes {accuracy}')
    return lines
