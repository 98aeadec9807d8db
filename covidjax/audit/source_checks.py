"""What tells the sources of a dataset apart without any finding, and how much of the class that gives away.

Shapes: N slices, S sources.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import StratifiedGroupKFold

from covidjax.audit.check import LOOK, NOT_CHECKED, OK, Check, count_things
from covidjax.audit.dataset import Dataset, make_printable
from covidjax.data.lists import Row
from covidjax.data.preprocess import cut_region, open_image
from covidjax.data.slice_lungs import cut_to_lungs, find_lungs_in_slice
from covidjax.data.sources import describe_lone_classes, find_lone_classes
from covidjax.evaluation.baselines import THUMBNAIL_SIZE
from covidjax.evaluation.metrics import compute_interval, draw_resamples, group_by_patient
from covidjax.progress import track
from covidjax.report.page import Table

NAME, TITLE = 'baselines.sources', 'What tells the sources apart'
MAX_PER_SOURCE = 200  # slices, spread evenly
_NUM_FOLDS = 5
_MIN_PATIENTS = 2  # of a source
_MIN_JUDGED = 20  # patients; see `baseline_checks`
_MIN_GAIN = 0.1  # of the lower end of the interval above chance
_PENALTY = 100.0
_COLUMNS = ('by', 'source', 'interval', 'chance', 'class, by the predicted source', 'chance')


class Features(NamedTuple):
    """What is measured of N slices, without a finding.

    Attributes:
      thumbnails: the box at 32 x 32, in [0, 1], [N, 1024].
      silhouettes: the lungs, cut to them, white on black, likewise.
      greys: mean grey inside the lungs [N, 1].
    """

    thumbnails: np.ndarray
    silhouettes: np.ndarray
    greys: np.ndarray


def check_lone_classes(dataset: Dataset) -> Check:
    """Names the classes that come from one source only."""
    name, title = 'metadata.lone_class', 'Classes of one source'
    rows = [row for part in dataset.splits.values() for row in part.rows]
    if not any(row.source for row in rows):
        return Check(name, title, NOT_CHECKED, 'metadata.csv gives no source for the patients of the lists.')
    lone = find_lone_classes(rows)
    if lone:
        text = describe_lone_classes(lone)
        return Check(name, title, LOOK, f'{text[0].upper()}{text[1:]}.')
    sources = {row.source for row in rows}
    if len(sources) == 1:
        return Check(name, title, OK, 'All slices come from one source: it can not give away a class.')
    return Check(name, title, OK, 'Every class comes from two sources or more.')


def check_sources(dataset: Dataset, files: set[str]) -> Check:
    """Scores how well thumbnails, silhouettes and mean grey tell the sources apart, cross-validated by patient.

    Args:
      dataset: the lists.
      files: images that exist.
    """
    rows = [row for part in dataset.splits.values() for row in part.rows if row.source and row.file in files]
    rows = draw_rows(rows)
    patients = {source: len({row.patient for row in rows if row.source == source}) for source in _name_sources(rows)}
    few = [source for source, number in patients.items() if number < _MIN_PATIENTS]
    rows = [row for row in rows if row.source not in few]
    if len(patients) - len(few) < 2:
        return Check(NAME, TITLE, NOT_CHECKED, 'There are fewer than two sources of two patients or more.')
    features, measured = measure(rows, dataset.images)
    num_lost = measured.count(False)
    rows = [row for row, is_measured in zip(rows, measured, strict=True) if is_measured]
    remaining = [len({row.patient for row in rows if row.source == source}) for source in _name_sources(rows)]
    if len(remaining) < 2 or min(remaining) < _MIN_PATIENTS:
        return Check(NAME, TITLE, NOT_CHECKED, 'The lungs are found in too few slices of a source.')
    scores = score_sources(rows, features, min(_NUM_FOLDS, *remaining))
    return _judge(scores, rows, few, num_lost)


def draw_rows(rows: Sequence[Row]) -> list[Row]:
    """Returns at most `MAX_PER_SOURCE` rows of every source, spread evenly over them."""
    drawn = []
    for source in _name_sources(rows):
        of_source = [row for row in rows if row.source == source]
        chosen = np.unique(np.linspace(0, len(of_source) - 1, MAX_PER_SOURCE).round().astype(int))
        drawn += [of_source[i] for i in chosen]
    return drawn


def _name_sources(rows: Sequence[Row]) -> list[str]:
    return sorted({row.source for row in rows})


def measure(rows: Sequence[Row], folder: Path) -> tuple[Features, list[bool]]:
    """Measures slices on all cores.

    Args:
      rows: one per image.
      folder: the image folder.

    Returns:
      The features of the readable slices in which lungs are found, and whether each slice is one.
    """
    parallel = joblib.Parallel(n_jobs=-1, backend='threading', return_as='generator')
    results = parallel(joblib.delayed(_measure_slice)(os.fspath(folder / row.file), row.box) for row in rows)
    found = list(track(results, 'sources', len(rows), 'slice'))
    kept = [one for one in found if one is not None]
    arrays = [np.array(values, np.float32).reshape(len(kept), -1) for values in zip(*kept, strict=True)]
    return Features(*arrays) if kept else Features(*[np.zeros((0, 1), np.float32)] * 3), [x is not None for x in found]


def _measure_slice(path: str, box: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Returns thumbnail, silhouette and mean grey; None if the image is unreadable or shows no lungs."""
    try:
        with open_image(path) as image:
            grey, _ = cut_region(image, box, 'body')
    except ValueError:
        return None
    mask = find_lungs_in_slice(grey)
    if mask is None or not mask.any():
        return None
    small = Image.fromarray(grey).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    outline, _ = cut_to_lungs(mask.astype(np.uint8) * 255, mask)
    outline = Image.fromarray(outline).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return np.asarray(small).ravel() / 255, np.asarray(outline).ravel() / 255, float(grey[mask].mean())


class SourceScore(NamedTuple):
    """How well something tells sources, and by them classes, apart: balanced accuracies, interval and chance."""

    by: str
    sources: float
    interval: list[float] | None
    chance: float
    classes: float
    class_chance: float


def score_sources(rows: Sequence[Row], features: Features, num_folds: int) -> list[SourceScore]:
    """Scores each kind of features, and for comparison the source itself.

    The class by the predicted source is the commonest class of that source among the other patients.

    Args:
      rows: of the slices, N of them.
      features: of the slices.
      num_folds: at most the number of patients of each source.
    """
    sources, labels = np.array([row.source for row in rows]), np.array([row.label for row in rows])
    patients = np.array([row.patient for row in rows])
    chance, class_chance = 1 / len(set(sources.tolist())), 1 / len(set(labels.tolist()))
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    folds = list(splitter.split(sources, sources, patients))

    def score(name: str, predict: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> SourceScore:
        found, classes = np.empty_like(sources), np.empty_like(labels)
        for seen, held_out in folds:
            found[held_out] = predict(seen, held_out)
            for source in set(found[held_out].tolist()):
                commonest = np.bincount(labels[seen][sources[seen] == source]).argmax()
                classes[held_out[found[held_out] == source]] = commonest
        return SourceScore(
            name,
            _compute_balanced(sources, found),
            _compute_interval(sources, found, patients),
            chance,
            _compute_balanced(labels, classes),
            class_chance,
        )

    def fit(model: Callable[[], Any], x: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        return lambda seen, held_out: model().fit(x[seen], sources[seen]).predict(x[held_out])

    def create_ridge() -> Any:
        return RidgeClassifier(_PENALTY, class_weight='balanced')

    def create_forest() -> Any:
        return RandomForestClassifier(100, min_samples_leaf=5, class_weight='balanced', random_state=0)

    return [
        score('32x32 thumbnail', fit(create_ridge, features.thumbnails)),
        score('silhouette of the lungs', fit(create_ridge, features.silhouettes)),
        score('mean grey in the lungs', fit(create_forest, features.greys)),
        score('the source itself', lambda seen, held_out: sources[held_out]),
    ]


def _compute_balanced(truth_N: np.ndarray, found_N: np.ndarray) -> float:
    """Returns the balanced accuracy, the mean recall of what occurs."""
    return float(np.mean([(found_N[truth_N == value] == value).mean() for value in np.unique(truth_N)]))


def _compute_interval(sources_N: np.ndarray, found_N: np.ndarray, patients_N: np.ndarray) -> list[float] | None:
    """Returns the interval of the balanced accuracy, by bootstrap over patients."""
    groups, (names, members) = group_by_patient(patients_N), np.unique(sources_N, return_inverse=True)
    right_PxS, total_PxS = (np.zeros((groups.max() + 1, len(names))) for _ in range(2))
    np.add.at(total_PxS, (groups, members), 1)
    np.add.at(right_PxS, (groups, members), found_N == sources_N)
    resamples_RxP = draw_resamples(len(total_PxS), seed=0)
    totals_RxS = resamples_RxP @ total_PxS
    is_complete = totals_RxS.min(1) > 0  # every source is in the resample
    return compute_interval(((resamples_RxP @ right_PxS)[is_complete] / totals_RxS[is_complete]).mean(1))


def _judge(scores: Sequence[SourceScore], rows: Sequence[Row], few: Sequence[str], num_lost: int) -> Check:
    names = _name_sources(rows)
    num_patients = len({row.patient for row in rows})
    telling = [one for one in scores[:-1] if one.interval and one.interval[0] > one.chance + _MIN_GAIN]
    has_classes = len({row.label for row in rows}) > 1
    shown = '; '.join(f'{one.by} {one.sources:.0%}' for one in scores[:-1])
    text = f'Balanced accuracy over {len(names)} sources, chance {scores[0].chance:.0%}: {shown}.'
    if num_patients < _MIN_JUDGED:
        verdict, text = NOT_CHECKED, f'{text} Fewer than {_MIN_JUDGED} patients are too few to judge by.'
    elif telling:
        verdict, best = LOOK, max(telling, key=lambda one: one.sources)
        if has_classes:
            text += (
                f' The source that the {best.by} tells gives the class with {best.classes:.0%} (chance '
                f'{best.class_chance:.0%}): a model may learn sources. Only a left-out source tells '
                '(crossvalidate --by=source).'
            )
    else:
        verdict = OK
    title = (
        f'Balanced accuracy, cross-validated by patient: {count_things(len(rows), "slice")} of {num_patients:,} '
        f'patients, at most {MAX_PER_SOURCE} slices of a source'
    )
    faults = [f'source {make_printable(name)}: fewer than {_MIN_PATIENTS} patients, left out' for name in few]
    if num_lost:
        faults.append(f'{count_things(num_lost, "slice")} in which no lungs are found, left out')
    return Check(NAME, TITLE, verdict, text, faults, [Table(title, _COLUMNS, [tuple(one) for one in scores])])
