"""Baseline checks: how well file names alone, or 32x32 thumbnails, predict the class.

Shapes: N examples, K classes, P patients, R resamples, D features.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from covidjax.audit import figures
from covidjax.audit.check import LOOK, NOT_CHECKED, OK, Check, join_words
from covidjax.audit.dataset import Dataset
from covidjax.data.lists import CLASSES, Row
from covidjax.data.sequences import NUM_SLICES
from covidjax.evaluation.baselines import compute_file_name_features, fit_file_names
from covidjax.evaluation.metrics import (
    compute_interval,
    compute_ranking,
    compute_scores,
    draw_resamples,
    group_by_patient,
)
from covidjax.report.page import Table

MAX_THUMBNAILS = 10_000  # per list, evenly spaced: more would change little and fill the memory
_NUM_FOLDS = 5
_MIN_GAIN = 0.1  # 'look' if the lower end of the interval of balanced accuracy exceeds chance by more
_PENALTY = 100.0  # ridge penalty for 1,024 pixels in 0..1; scores hardly change from 10 to 1000
_SEPARABLE = 0.9  # area under the curve over slices from which two classes are separable; by convention 'outstanding'
_MIN_PATIENTS = 5  # per class, to compute an interval
_MIN_JUDGED = 20  # patients needed for an interval and a verdict: resampling fewer misleads
_COLUMNS = (
    'examples',
    'fitted on',
    'scored on',
    'number',
    'patients',
    'majority class',
    'accuracy',
    'interval of accuracy',
    'chance',
    'balanced accuracy',
    'interval of balanced accuracy',
)
_PAIR_COLUMNS = (
    'class',
    'against',
    'over slices',
    'over patients',
    'interval over patients',
    'patients',
    'patients against',
)


class Examples(NamedTuple):
    """Examples of one list.

    Attributes:
      features: float [N, D].
      labels: int [N].
      patients: [N].
      weights: number of slices that an example represents, int [N].
    """

    features: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    weights: np.ndarray

    def take(self, chosen: np.ndarray) -> 'Examples':
        """Returns the examples with the indices `chosen`."""
        return Examples(*(values[chosen] for values in self))


class Scored(NamedTuple):
    """Held-out scores [N, K]: the model was fitted on another list or, in cross-validation, on other patients."""

    fitted_on: str
    scored_on: str
    examples: Examples
    scores: np.ndarray
    majority: int


def score_examples(splits: Mapping[str, Examples], fit) -> Iterator[Scored]:
    """Fits a model on the first list and scores the others; with one list, cross-validates by patient.

    Args:
      splits: examples by split, in the order train, val, test.
      fit: Examples -> (features [N, D] -> scores [N, K]).

    Yields:
      The scores of each list after the first, or of the only one. Nothing if there are too few patients or classes.
    """
    splits = {split: examples for split, examples in splits.items() if len(examples.labels)}
    if not splits:
        return
    (first, fitted), *others = splits.items()
    if len(set(fitted.labels.tolist())) < 2:
        return
    majority = int(np.bincount(fitted.labels, fitted.weights).argmax())
    if others:
        predict = fit(fitted)
        for split, examples in others:
            yield Scored(first, split, examples, predict(examples.features), majority)
        return
    patients_per_class = [len(set(fitted.patients[fitted.labels == label])) for label in set(fitted.labels.tolist())]
    num_folds = min(_NUM_FOLDS, *patients_per_class)
    if num_folds < 2:
        return
    scores = np.empty((len(fitted.labels), len(CLASSES)))
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    for seen, held_out in folds.split(fitted.features, fitted.labels, fitted.patients):
        scores[held_out] = fit(fitted.take(seen))(fitted.features[held_out])
    yield Scored(f'{first}, {num_folds} folds by patient', first, fitted, scores, majority)


def compute_accuracies(scored: Scored, predicted: np.ndarray) -> dict:
    """Computes accuracy and balanced accuracy (mean recall of the classes present), with intervals by patient.

    Args:
      scored: the examples with their weights.
      predicted: classes, int [N].

    Returns:
      {'accuracy', 'accuracy_interval', 'balanced', 'balanced_interval'}.
    """
    k = len(CLASSES)
    groups = group_by_patient(scored.examples.patients)
    by_patient = np.zeros((groups.max() + 1, k, k))
    np.add.at(by_patient, (groups, scored.examples.labels, predicted), scored.examples.weights)
    resamples_RxP = draw_resamples(len(by_patient), seed=0)
    resampled = (resamples_RxP @ by_patient.reshape(-1, k * k)).reshape(-1, k, k)
    both = [compute_scores(confusion, undefined=np.nan) for confusion in (by_patient.sum(0), resampled)]
    present = both[0]['recall'] >= 0  # not NaN
    point, interval = ({'accuracy': s['accuracy'], 'balanced': s['recall'][..., present].mean(-1)} for s in both)
    return {name: float(point[name]) for name in point} | {
        f'{name}_interval': compute_interval(interval[name]) for name in interval
    }


def _list_row(level: str, scored: Scored, predicted: np.ndarray) -> tuple:
    examples = scored.examples
    found = compute_accuracies(scored, predicted)
    number = int(examples.weights.sum())
    majority = float(examples.weights[examples.labels == scored.majority].sum() / number)
    chance = 1 / len(set(examples.labels.tolist()))
    num_patients = len(set(examples.patients.tolist()))
    few = num_patients < _MIN_JUDGED
    return (
        level,
        scored.fitted_on,
        scored.scored_on,
        number,
        num_patients,
        majority,
        found['accuracy'],
        None if few else found['accuracy_interval'],
        chance,
        found['balanced'],
        None if few else found['balanced_interval'],
    )


def _beats_chance(row: tuple) -> bool:
    by_name = dict(zip(_COLUMNS, row, strict=True))
    interval = by_name['interval of balanced accuracy']
    return interval is not None and interval[0] > by_name['chance'] + _MIN_GAIN


# ---------------------------------------------------------------------------------------------------------------------
# File names


def check_names(dataset: Dataset) -> Check:
    """Scores a classifier on slice count, first and last number and gaps of a scan. It reads no pixel."""
    name, title = 'baselines.names', 'What file names alone predict'
    rows = []
    for level in ('slices', 'scans', f'scans of {NUM_SLICES} slices or more'):
        splits = {split: _collect_names(part.scans, level) for split, part in dataset.splits.items()}
        rows += [_list_row(level, scored, scored.scores.argmax(1)) for scored in score_examples(splits, fit_forest)]
    if not rows:
        return Check(name, title, NOT_CHECKED, 'There are too few patients or classes to fit and to score.')
    telling = [row for row in rows if _beats_chance(row)]
    judged = [row for row in rows if row[4] >= _MIN_JUDGED]
    row = (telling or judged or rows)[-1]
    shown = f'{row[6]:.0%} of the {row[3]:,} {row[0]} of {row[2]} (majority class {row[5]:.0%}; balanced {row[9]:.0%})'
    if not judged:
        verdict, reason = NOT_CHECKED, f'Fewer than {_MIN_JUDGED} patients are too few to judge by.'
    elif telling:
        verdict = LOOK
        reason = f'Without a pixel, numbers in file names classify {shown}: read every result beside that.'
    else:
        verdict = OK
        reason = f'Numbers in file names do not tell the classes apart: they classify {shown}.'
    table = Table('Random forest on slice count, first and last number, mean and largest gap of a scan', _COLUMNS, rows)
    check = Check(name, title, verdict, reason, tables=[table])
    check.pictures.append(functools.partial(figures.render_accuracies, _COLUMNS, rows))
    return check


def _collect_names(scans, level: str) -> Examples:
    chosen = [scan for scan in scans if not level.startswith('scans of') or len(scan.records) >= NUM_SLICES]
    lengths = [len(scan.records) for scan in chosen]
    return Examples(
        # All slices share the features of their scan, so a scan is one example, weighted by its slices.
        np.array([compute_file_name_features(scan) for scan in chosen]).reshape(len(chosen), 5),
        np.array([scan.label for scan in chosen], int),
        np.array([scan.patient for scan in chosen]),
        np.array(lengths if level == 'slices' else [1] * len(chosen), int),
    )


def fit_forest(examples: Examples):
    """Fits `baselines.fit_file_names`."""
    return fit_file_names(examples.features, examples.labels, examples.weights)


# ---------------------------------------------------------------------------------------------------------------------
# Thumbnails


def draw_thumbnail_rows(dataset: Dataset) -> dict[str, list[Row]]:
    """Returns the rows of each list to use for thumbnails: all, or `MAX_THUMBNAILS` evenly spaced ones."""
    drawn = {}
    for split, part in dataset.splits.items():
        chosen = np.linspace(0, len(part.rows) - 1, min(len(part.rows), MAX_THUMBNAILS)).round().astype(int)
        drawn[split] = [part.rows[i] for i in chosen]
    return drawn


def check_thumbnails(drawn: Mapping[str, Sequence[Row]], crops: Mapping[str, np.ndarray]) -> Check:
    """Scores ridge regression on thumbnails, too small for most lesions, and separates each pair of classes."""
    name, title = 'baselines.thumbnails', 'What a thumbnail predicts'
    splits = {
        split: _collect_thumbnails([row for row in rows if row.file in crops], crops) for split, rows in drawn.items()
    }
    every = list(score_examples(splits, fit_ridge))
    if not every:
        return Check(name, title, NOT_CHECKED, 'There are too few readable images, patients or classes.')
    rows = [_list_row('slices', scored, scored.scores.argmax(1)) for scored in every]
    # Pairs need many patients more than independent lists: pool all lists and cross-validate by patient.
    full = [examples for examples in splits.values() if len(examples.labels)]
    if len(full) > 1:
        pooled = Examples(*(np.concatenate(values) for values in zip(*full, strict=True)))
        every = list(score_examples({'all lists': pooled}, fit_ridge)) or every
    pairs = _compare_pairs(every[-1])
    verdict, reason = _judge_thumbnails(pairs, rows[-1])
    pair_rows = [(*pair, *found.values()) for pair, found in pairs.items()]
    pair_title = f'Area under the curve of each pair of classes ({every[-1].fitted_on})'
    tables = [
        Table('Ridge regression on the box at 32x32', _COLUMNS, rows),
        Table(pair_title, _PAIR_COLUMNS, pair_rows),
    ]
    check = Check(name, title, verdict, reason, tables=tables)
    check.pictures.append(functools.partial(figures.render_accuracies, _COLUMNS, rows))
    fitted = next(iter(examples for examples in splits.values() if len(examples.labels)))
    means = {
        c: fitted.features[fitted.labels == i].mean(0) for i, c in enumerate(CLASSES) if (fitted.labels == i).any()
    }
    check.pictures.append(functools.partial(figures.render_means, means))
    return check


def _collect_thumbnails(rows: Sequence[Row], crops: Mapping[str, np.ndarray]) -> Examples:
    return Examples(
        np.array([crops[row.file].ravel() for row in rows], float).reshape(len(rows), -1) / 255,
        np.array([row.label for row in rows], int),
        np.array([row.patient for row in rows]),
        np.ones(len(rows), int),
    )


def fit_ridge(examples: Examples):
    """Fits ridge regression to targets of +1 and -1, one column per class."""
    targets = 2.0 * np.eye(len(CLASSES))[examples.labels] - 1
    return Ridge(alpha=_PENALTY).fit(examples.features, targets).predict


def _compare_pairs(scored: Scored) -> dict[tuple[str, str], dict]:
    """Returns, per pair of classes, the area under the curve of the score difference, over slices and patients."""
    examples, found = scored.examples, {}
    for a, b in combinations(range(len(CLASSES)), 2):
        members = [np.flatnonzero(examples.labels == label) for label in (a, b)]
        if not all(map(len, members)):
            continue
        differences = [scored.scores[m, a] - scored.scores[m, b] for m in members]
        patients = [group_by_patient(examples.patients[m]) for m in members]
        means = [np.bincount(p, d) / np.bincount(p) for p, d in zip(patients, differences, strict=True)]
        slices, is_positive = _join(*differences)
        by_patient = compute_ranking(*_join(*means), range(sum(map(len, means))))
        few = min(map(len, means)) < _MIN_PATIENTS  # too few patients to resample
        found[CLASSES[a], CLASSES[b]] = {
            'auc_slices': float(roc_auc_score(is_positive, slices)),
            'auc_patients': by_patient['auc'],
            'interval': None if few else by_patient['auc_interval'],
            'num_patients': len(means[0]),
            'num_patients_against': len(means[1]),
        }
    return found


def _join(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns all scores and a bool mask of the positives."""
    return np.concatenate([positive, negative]), np.repeat([True, False], [len(positive), len(negative)])


def _judge_thumbnails(pairs: Mapping[tuple[str, str], dict], row: tuple) -> tuple[str, str]:
    """Returns verdict and reason from the separability of the classes and the accuracy on the last list."""
    aucs = {pair: found['auc_slices'] for pair, found in pairs.items()}
    separable = [pair for pair, auc in aucs.items() if auc >= _SEPARABLE]
    accuracy = f'a 32x32 thumbnail classifies {row[6]:.0%} of the slices of {row[2]} (majority class {row[5]:.0%})'
    if not separable:
        verdict = LOOK if _beats_chance(row) else OK
        advice = ': read every result beside that' if verdict == LOOK else ''
        highest = max(aucs.values(), default=0.5)
        return verdict, (
            f'{accuracy[0].upper()}{accuracy[1:]}, and no class stands apart by it (area under the curve up to '
            f'{highest:.2f}){advice}.'
        )
    for name in CLASSES:
        of_name = [pair for pair in aucs if name in pair]
        rest = [pair for pair in aucs if name not in pair]
        # One class is separable from all others, which are not separable from each other.
        if set(separable) == set(of_name) and rest:
            others = join_words([other for pair in of_name for other in pair if other != name])
            shown = join_words([f'{aucs[pair]:.3f}' for pair in of_name])
            return LOOK, (
                f'{name} is separable from {others} by a 32x32 thumbnail, too small for most lesions (area under the '
                f'curve {shown}): it probably comes from another source or preparation, so accuracy on {name} says '
                f'little about disease, and only {" against ".join(rest[0])} ({aucs[rest[0]]:.3f}) is evidence.'
            )
    shown = join_words([f'{a} from {b} ({aucs[a, b]:.3f})' for a, b in separable])
    return LOOK, (
        f'A 32x32 thumbnail, too small for most lesions, tells {shown} by area under the curve: these classes probably '
        f'differ in source or preparation, so accuracy on them says little about disease; {accuracy}.'
    )
