"""Checks class against metadata.csv: if a class comes from one source, a model may learn the source instead."""

import functools
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from covidjax.audit import figures
from covidjax.audit.check import BROKEN, LOOK, NOT_CHECKED, OK, Check, count_things
from covidjax.audit.dataset import Dataset, make_printable
from covidjax.data.lists import CLASSES, name_age
from covidjax.report.page import Table

_COLUMNS = {
    'source': 'Class against source',
    'country': 'Class against country',
    'sex': 'Class against sex',
    'age': 'Class against age',
    'slice selection': 'Class against slice selection',
    'verified finding': 'Class against verification',
}
_FINDINGS = {'Normal': 'normal', 'Pneumonia': 'pneumonia', 'COVID-19': 'covid19'}
_UNKNOWN = 'not given'
_MIN_PATIENTS = 3  # fewer patients of one class are no pattern
_MAX_ROWS = 30


class _Patient(NamedTuple):
    name: str
    label: int
    num_slices: int


def check_metadata(dataset: Dataset) -> list[Check]:
    """Joins the patients of the lists with metadata.csv and tabulates class against each of its columns."""
    patients = _group_patients(dataset)
    metadata = dataset.metadata
    if metadata is None:
        # An unreadable file is broken; a missing one is only not checked.
        is_bad = (dataset.raw_dir / 'metadata.csv').exists()
        reason = f'{dataset.metadata_reason[:1].upper()}{dataset.metadata_reason[1:]}.'
        first = Check('metadata.patients', 'Patients in metadata.csv', BROKEN if is_bad else NOT_CHECKED, reason)
        reason = 'There is no usable metadata.csv.'
        return [first] + [Check(_name_check(c), title, NOT_CHECKED, reason) for c, title in _COLUMNS.items()]
    known = [patient for patient in patients if patient.name in metadata]
    return [
        _check_join(patients, known, metadata),
        *(_check_column(known, column, title, metadata) for column, title in _COLUMNS.items()),
    ]


def _name_check(column: str) -> str:
    return f'metadata.{column.replace(" ", "_")}'


def _group_patients(dataset: Dataset) -> list[_Patient]:
    """Returns the patients of all lists; a patient with two classes is listed twice."""
    num_slices: Counter[tuple[str, int]] = Counter()
    for part in dataset.splits.values():
        for scan in part.scans:
            num_slices[scan.patient, scan.label] += len(scan.records)
    return [_Patient(name, label, number) for (name, label), number in num_slices.items()]


def _check_join(patients: Sequence[_Patient], known: Sequence[_Patient], metadata: dict) -> Check:
    unknown = [f'patient {p.name}: not in metadata.csv' for p in patients if p.name not in metadata]
    contradictions = [
        f'patient {p.name}: {CLASSES[p.label]} in the lists, {_FINDINGS[finding]} in metadata.csv'
        for p in known
        if (finding := metadata[p.name].get('finding')) in _FINDINGS and _FINDINGS[finding] != CLASSES[p.label]
    ]
    if unknown or contradictions:
        verdict = LOOK
        reason = (
            f'Of {count_things(len(patients), "patient")} of the lists, {len(unknown):,} are not in metadata.csv and '
            f'{len(contradictions):,} have another finding there.'
        )
    else:
        verdict, reason = OK, f'All {count_things(len(patients), "patient")} of the lists are there, findings agree.'
    return Check('metadata.patients', 'Patients in metadata.csv', verdict, reason, contradictions + unknown)


def _check_column(patients: Sequence[_Patient], column: str, title: str, metadata: dict) -> Check:
    """Counts patients and slices per value and class, and finds values with a single class."""
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0] * len(CLASSES))
    slices: Counter[str] = Counter()
    for patient in patients:
        value = _read_value(metadata[patient.name].get(column), column)
        counts[value][patient.label] += 1
        slices[value] += patient.num_slices
    name = _name_check(column)
    if set(counts) <= {_UNKNOWN}:
        return Check(name, title, NOT_CHECKED, f'metadata.csv gives no {column} for the patients of the lists.')
    order = sorted(counts) if column == 'age' else sorted(counts, key=lambda value: -sum(counts[value]))
    rows = [(value, *counts[value], sum(counts[value]), slices[value]) for value in order[:_MAX_ROWS]]
    table = Table('Patients', (column, *CLASSES, 'patients', 'slices'), rows)
    single = [v for v in order if sum(counts[v]) >= _MIN_PATIENTS and sum(n > 0 for n in counts[v]) == 1]
    faults = [
        f'{column} {v}: {counts[v][_find_only(counts[v])]:,} patients, all {_show_only(counts[v])}' for v in single
    ]
    total = sum(map(sum, counts.values()))
    by_value = sum(max(values) for values in counts.values()) / total
    by_class = max(map(sum, zip(*counts.values(), strict=True))) / total
    guess = f'guessing by {column} is right for {by_value:.0%} of the patients (without it, {by_class:.0%})'
    one_class = sum(n > 0 for n in map(sum, zip(*counts.values(), strict=True))) == 1
    if single and not one_class:
        verb = 'carries' if len(single) == 1 else 'carry'
        reason = (
            f'{len(single)} of {len(counts)} values of {column} {verb} one class only; {guess}, so a model may learn '
            f'{column}.'
        )
        verdict = LOOK
    else:
        verdict, faults = OK, []
        reason = (
            f'No value of {column} carries one class only; {guess}.' if not one_class else 'There is one class only.'
        )
    check = Check(name, title, verdict, reason, faults, [table])
    if column == 'source':
        check.pictures.append(
            functools.partial(figures.render_shares, {value: counts[value] for value in order[:_MAX_ROWS]}, 'source')
        )
    return check


def _find_only(values: Sequence[int]) -> int:
    return next(label for label, number in enumerate(values) if number)


def _show_only(values: Sequence[int]) -> str:
    return CLASSES[_find_only(values)]


def _read_value(text: str | None, column: str) -> str:
    """Returns the value to count in a column; ages become bands of 20 years."""
    text = (text or '').strip()
    if not text:
        return _UNKNOWN
    if column != 'age':
        return make_printable(text[:60])
    return name_age(text)
