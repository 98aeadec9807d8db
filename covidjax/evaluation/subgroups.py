"""Scores by subgroup of the patients: sex, age, country, source, number of slices, thickness.

Shapes: N examples, K classes.
"""

import itertools
import logging
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covidjax.data.lists import Row, name_age, read_metadata
from covidjax.errors import UserError
from covidjax.evaluation.estimates import (
    UNDEFINED,
    Estimate,
    describe,
    draw_sample,
    estimate_auc,
    estimate_mean,
    subtract,
)
from covidjax.evaluation.screening import TARGETS, compute_target_scores, find_target

log = logging.getLogger(__name__)

MIN_PATIENTS = 20  # of a group that is scored
COLUMNS = ('sex', 'age', 'country', 'source')  # of metadata.csv
UNKNOWN = 'not given'
_SEXES = {'m': 'male', 'f': 'female'}
_SLICE_BANDS = (2, 16, 50, 150)  # lower ends, above a single slice
_THICKNESSES_MM = (1.5, 3.5)


def name_group(column: str, text: str | None) -> str:
    """Returns the group of a value of metadata.csv: a band for 'age', 'male' for 'M', `UNKNOWN` for a blank."""
    text = (text or '').strip()
    if not text:
        return UNKNOWN
    if column == 'age':
        return name_age(text)
    if column == 'sex':
        return _SEXES.get(text.lower(), text.lower())
    return text if text.isprintable() else ascii(text)[1:-1]


def name_slices(count: int) -> str:
    """Returns the band of a number of slices: '1', '2-15', '16-49', '50-149' or '150 or more'."""
    if count < _SLICE_BANDS[0]:
        return '1'
    for low, high in itertools.pairwise(_SLICE_BANDS):
        if count < high:
            return f'{low}-{high - 1}'
    return f'{_SLICE_BANDS[-1]} or more'


def name_thickness(thickness_mm: float | None) -> str:
    """Returns the band of a thickness: 'up to 1.5 mm', '1.5 to 3.5 mm' or 'above 3.5 mm'."""
    if thickness_mm is None:
        return UNKNOWN
    thin, thick = _THICKNESSES_MM
    if thickness_mm <= thin:
        return f'up to {thin} mm'
    return f'{thin} to {thick} mm' if thickness_mm <= thick else f'above {thick} mm'


def read_columns(raw_dir: Path, examples: Sequence[Any], rows: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the group of every example in each column that a raw directory knows.

    Args:
      raw_dir: directory of the lists; its metadata.csv may be missing or without a patient.
      examples: N rows or scans, with `scan` and `patient`.
      rows: all rows of the list, to count the slices of a scan.
    """
    path = raw_dir / 'metadata.csv'
    metadata = {}
    if path.is_file():
        try:
            metadata = read_metadata(os.fspath(path))
        except UserError as error:
            log.warning('no subgroups by metadata.csv: %s', error)
    columns = {
        column: [name_group(column, metadata.get(example.patient, {}).get(column)) for example in examples]
        for column in COLUMNS
    }
    counts = Counter(row.scan for row in rows)
    return columns | {'number of slices': [name_slices(counts[example.scan]) for example in examples]}


def compute_subgroups(
    columns: Mapping[str, Sequence[str]],
    labels_N: np.ndarray,
    probabilities_NxK: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    thresholds: Mapping[str, float | None],
) -> dict[str, Any]:
    """Scores every group of every column.

    Args:
      columns: name -> group of each example. Columns that are unknown for all examples are left out.
      labels_N: int, 0 .. K-1.
      probabilities_NxK: calibrated.
      patients: patient of each example.
      classes: K names.
      thresholds: of the run, by target of `screening.TARGETS`; None if there is none.

    Returns:
      A JSON-able dict: 'min_patients', and 'columns'.<name>.{groups, gaps}. A group is {group, num_patients,
      num_examples, scores}; its scores are None with fewer than `MIN_PATIENTS` patients, else <score>.{value,
      interval} for 'accuracy', and 'sensitivity_<target>' at the threshold and 'auc_<target>' for every target. A gap,
      by score, is {highest, lowest, difference, interval} of the two known groups furthest apart, None with fewer than
      two. This pair was chosen for its gap, so its interval is too optimistic; it takes the groups for independent.
    """
    patients, found = np.asarray(patients), {}
    for column, values in columns.items():
        groups = np.asarray(values)
        names = sorted(set(groups.tolist()), key=lambda name: (name == UNKNOWN, name))
        if names in ([], [UNKNOWN]):
            continue
        listed, estimates = [], {}
        for name in names:
            members = groups == name
            num_patients = len(set(patients[members].tolist()))
            scores = None
            if num_patients >= MIN_PATIENTS:
                of_group = labels_N[members], probabilities_NxK[members], patients[members]
                scores = _score(*of_group, classes, thresholds)
                if name != UNKNOWN:
                    estimates[name] = scores
            listed.append(
                {
                    'group': name,
                    'num_patients': num_patients,
                    'num_examples': int(members.sum()),
                    'scores': scores and {key: describe(estimate) for key, estimate in scores.items()},
                }
            )
        found[column] = {'groups': listed, 'gaps': _find_gaps(estimates)}
    return {'min_patients': MIN_PATIENTS, 'columns': found}


def _score(
    labels_N: np.ndarray,
    probabilities_NxK: np.ndarray,
    patients: np.ndarray,
    classes: Sequence[str],
    thresholds: Mapping[str, float | None],
) -> dict[str, Estimate]:
    # The seed depends on the patients: groups are resampled independently, and the same group twice is the same.
    sample = draw_sample(patients, seed=zlib.crc32('\n'.join(sorted(set(patients.tolist()))).encode()))
    found = {'accuracy': estimate_mean(sample, probabilities_NxK.argmax(1) == labels_N)}
    for target in TARGETS:
        scores = compute_target_scores(probabilities_NxK, classes, target)
        positive, threshold = find_target(labels_N, classes, target), thresholds[target]
        found[f'sensitivity_{target}'] = (
            UNDEFINED if threshold is None else estimate_mean(sample, scores >= threshold, positive)
        )
        found[f'auc_{target}'] = estimate_auc(sample, scores, positive)
    return found


def _find_gaps(estimates: Mapping[str, dict[str, Estimate]]) -> dict[str, dict[str, Any] | None]:
    gaps = {}
    for key in next(iter(estimates.values()), {}):
        values = {name: scores[key] for name, scores in estimates.items() if scores[key].value is not None}
        if len(values) < 2:
            gaps[key] = None
            continue
        highest, lowest = (choose(values, key=lambda name: values[name].value) for choose in (max, min))
        if highest == lowest:  # all are equal
            highest, lowest = list(values)[:2]
        gaps[key] = {'highest': highest, 'lowest': lowest, **subtract(values[highest], values[lowest])}
    return gaps
