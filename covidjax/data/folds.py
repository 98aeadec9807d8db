"""Folds of a dataset: every patient of the training and validation lists, or every source, is held out once.

The test list takes no part: it stays held out for all folds, so that their ensemble can be tested on it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covidjax.data.covidx_ct import Prepared
from covidjax.data.lists import CLASSES, Row
from covidjax.data.sources import Subset
from covidjax.errors import UserError
from covidjax.files import write_json

FOLD = 'fold.json'  # in the workdir of a fold
POOL = ('train', 'val')  # lists that are divided


class Fold(NamedTuple):
    """One division of the pool, which is the training and validation lists together.

    Attributes:
      name: e.g. 'fold 1 of 5', 'without MosMedData'.
      held_out: patients that the fold tests, sorted.
      validation: patients for early stopping and calibration, sorted. All others are trained on.
    """

    name: str
    held_out: tuple[str, ...]
    validation: tuple[str, ...]


def get_pool(data: Prepared) -> list[Row]:
    """Returns the rows that are divided: train, then val."""
    return [row for split in POOL for row in data.rows[split]]


def divide_patients(rows: Sequence[Row], num_folds: int, seed: int) -> list[Fold]:
    """Divides patients into folds with about equal numbers of patients of every class.

    The next fold validates. Two folds would leave nothing to train on; there, half of the other fold validates.

    Args:
      rows: the pool. A patient counts for the class of most of their slices.
      num_folds: at least 2.
      seed: of the shuffling.

    Raises:
      UserError: there are fewer than two folds, or a class has too few patients for as many.
    """
    from sklearn.model_selection import StratifiedKFold  # slow to import

    if num_folds < 2:
        raise UserError(f'--folds={num_folds}: it must be at least 2')
    num_parts = 4 if num_folds == 2 else num_folds
    patients, labels = list_patients(rows)
    for label, count in sorted(Counter(labels.tolist()).items()):
        if count < num_parts:
            advice = f'pass --folds={count}' if count > 2 else 'folds need at least 3 patients of every class'
            raise UserError(
                f'--folds={num_folds}: only {count} patients of {" and ".join(POOL)} are {CLASSES[label]}: {advice}'
            )
    parts = np.empty(len(patients), int)
    splitter = StratifiedKFold(num_parts, shuffle=True, random_state=seed)
    for part, (_, members) in enumerate(splitter.split(patients, labels)):
        parts[members] = part
    width = num_parts // num_folds

    def select(wanted: Sequence[int]) -> tuple[str, ...]:
        return tuple(sorted(patients[i] for i in np.flatnonzero(np.isin(parts, wanted))))

    return [
        Fold(
            f'fold {number + 1} of {num_folds}',
            select(range(number * width, (number + 1) * width)),
            select([(number + 1) * width % num_parts]),
        )
        for number in range(num_folds)
    ]


def get_sources(data: Prepared) -> dict[str, str]:
    """Returns the source of every patient.

    Raises:
      UserError: metadata.csv is missing or damaged, or gives no source for a patient of the lists.
    """
    sources = {row.patient: row.source for rows in data.rows.values() for row in rows}
    unknown = sorted(patient for patient, source in sources.items() if not source)
    if unknown:
        raise UserError(
            f'{data.raw_dir / "metadata.csv"} gives no source for {len(unknown)} patients of the lists, {unknown[0]} '
            'first: fill the column source, or leave out --by=source'
        )
    return sources


def parse_groups(text: str) -> list[tuple[str, ...]]:
    """Parses groups of sources: 'A;B,C' is A, and B with C."""
    groups = [tuple(name.strip() for name in part.split(',') if name.strip()) for part in text.split(';')]
    return [group for group in groups if group]


def divide_sources(
    rows: Sequence[Row], sources: Mapping[str, str], groups: Sequence[tuple[str, ...]], seed: int
) -> list[Fold]:
    """Returns a fold for every group of sources: all its patients are held out.

    Of the patients of each other source and class, about one in five validates, and at least one of two.

    Args:
      rows: the pool.
      sources: source of every patient.
      groups: names of sources; empty for every source on its own.
      seed: of the shuffling.

    Raises:
      UserError: a source is unknown or in two groups, or without a group one class is left.
    """
    patients, labels = list_patients(rows)
    known = sorted({sources[patient] for patient in patients})
    groups = groups or [(name,) for name in known]
    named = [name for group in groups for name in group]
    wrong = [name for name in named if name not in known or named.count(name) > 1]
    if wrong:
        raise UserError(
            f'--groups: {wrong[0]!r} is {"in two groups" if wrong[0] in known else "no source of train and val"}; '
            f'sources are {", ".join(known)}, written as A;B,C'
        )
    folds = []
    for group in groups:
        rng = np.random.default_rng(seed)
        strata: dict[tuple[str, int], list[str]] = {}
        for patient, label in zip(patients, labels.tolist(), strict=True):
            if sources[patient] not in group:
                strata.setdefault((sources[patient], label), []).append(patient)
        if len({label for _, label in strata}) < 2:
            raise UserError(f'without {", ".join(group)} fewer than two classes are left to train on')
        chosen = [
            str(patient)
            for _, members in sorted(strata.items())
            for patient in rng.permutation(members)[: max(round(len(members) / 5), len(members) > 1)]
        ]
        held_out = tuple(patient for patient in patients if sources[patient] in group)
        folds.append(Fold(f'without {", ".join(group)}', held_out, tuple(sorted(chosen))))
    return folds


def list_patients(rows: Sequence[Row]) -> tuple[list[str], np.ndarray]:
    """Returns the patients, sorted, and the class of most slices of each (of equal ones the first), int [P]."""
    counts: dict[str, Counter] = {}
    for row in rows:
        counts.setdefault(row.patient, Counter())[row.label] += 1
    patients = sorted(counts)
    return patients, np.array([max(sorted(counts[p]), key=counts[p].__getitem__) for p in patients])


def select_fold(data: Prepared, fold: Fold) -> Prepared:
    """Returns the dataset of one fold: its split 'test' has the patients that are held out, not those of the test list.

    Raises:
      UserError: a patient of the fold is not in the lists, or a split is empty.
    """
    roles = dict.fromkeys(fold.held_out, 'test') | dict.fromkeys(fold.validation, 'val')
    known = {row.patient for row in get_pool(data)}
    unknown = sorted(roles.keys() - known)
    if unknown:
        raise UserError(
            f'{fold.name}: {len(unknown)} of its patients, {unknown[0]} first, are not in the lists of {data.raw_dir}: '
            'the lists have changed; put them back, or choose another --workdir'
        )
    rows, places = ({split: [] for split in data.rows} for _ in range(2))
    for split in POOL:
        for number, row in enumerate(data.rows[split]):
            role = roles.get(row.patient, 'train')
            rows[role].append(row)
            places[role].append((data.sources[split], number))
    empty = [role for role, members in rows.items() if not members]
    if empty:
        raise UserError(f'{fold.name} leaves no patient for {empty[0]}')
    digest = hashlib.sha256(json.dumps([data.fingerprint, *fold]).encode())
    return data._replace(
        fingerprint=digest.hexdigest(),
        rows=rows,
        sources={split: Subset(of_split) for split, of_split in places.items()},
        fold=fold.name,
    )


def write_fold(workdir: Path, fold: Fold) -> None:
    """Writes fold.json, which makes a workdir that of a fold."""
    write_json(workdir / FOLD, fold._asdict())


def read_fold(workdir: Path) -> Fold | None:
    """Returns the fold of a workdir, None for a usual run.

    Raises:
      UserError: fold.json is damaged.
    """
    path = Path(workdir) / FOLD
    try:
        return parse_fold(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f'{path} is unreadable ({error}): run the crossvalidate command again') from error


def parse_fold(value: dict) -> Fold:
    """Returns a fold read from JSON. Raises TypeError if a field is missing or unknown."""
    fold = Fold(**value)
    return fold._replace(held_out=tuple(fold.held_out), validation=tuple(fold.validation))
