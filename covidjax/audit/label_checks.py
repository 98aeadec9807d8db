"""Labels that a cross-validation finds suspicious: reads its predictions.csv."""

import csv
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from covidjax.audit.check import LOOK, NOT_CHECKED, OK, Check
from covidjax.audit.dataset import Dataset
from covidjax.data.lists import CLASSES
from covidjax.data.preprocess import Box, load_slice
from covidjax.errors import UserError
from covidjax.evaluation.label_errors import describe_label_errors
from covidjax.report.charts import create_picture
from covidjax.report.label_errors import COLUMNS, NUM_LISTED, describe_count, render_suspects
from covidjax.report.page import Picture, Table

_TITLE = 'Labels that may be wrong'
_SIDE = 128  # pixels of a picture


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Reads predictions.csv of a cross-validation of a slice model.

    Returns:
      Probabilities [K] by file.

    Raises:
      UserError: the file is missing, is no such table, or has a bad row.
    """
    try:
        with path.open(newline='') as file:
            reader = csv.DictReader(file)
            absent = {'file', *(f'p_{name}' for name in CLASSES)} - set(reader.fieldnames or ())
            if absent:
                raise UserError(
                    f'--predictions={path} has no column {", ".join(sorted(absent))}: pass predictions.csv of a '
                    'cross-validation of a slice model'
                )
            rows = {row['file']: np.array([float(row[f'p_{name}']) for name in CLASSES]) for row in reader}
    except OSError as error:
        raise UserError(f'--predictions={path} cannot be read ({error.strerror})') from error
    except (ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'--predictions={path} is damaged ({error}): let covidjax evaluate write it again') from error
    if not all(np.isfinite(p).all() and abs(p.sum() - 1) < 1e-3 for p in rows.values()):
        raise UserError(f'--predictions={path} is damaged: its probabilities do not sum to 1')
    return rows


def check_predicted_labels(dataset: Dataset, predictions: dict[str, np.ndarray]) -> Check:
    """Finds slices and scans whose label a model that did not train on them contradicts."""
    name = 'labels.model'
    rows = [row for part in dataset.splits.values() for row in part.rows if row.file in predictions]
    if not rows:
        return Check(name, _TITLE, NOT_CHECKED, 'The predictions are for other files than those of the lists.')
    found = describe_label_errors(
        np.stack([predictions[row.file] for row in rows]),
        np.array([row.label for row in rows]),
        [row.file for row in rows],
        [row.patient for row in rows],
        [row.scan for row in rows],
    )
    counts = ' '.join(describe_count(kind, of_kind) for kind, of_kind in found.items())
    faults = [
        f'{kind[:-1]} {s["name"]}: {s["label"]} in the lists, rather {s["suggested"]} (margin {s["margin"]:.2f})'
        for kind in ('scans', 'slices')
        for s in found[kind]['suspects']
    ]
    tables = [
        Table(
            f'{kind.capitalize()} by margin, the most suspicious first',
            COLUMNS,
            [[suspect[column] for column in COLUMNS] for suspect in of_kind['suspects'][:NUM_LISTED]],
        )
        for kind, of_kind in found.items()
    ]
    check = Check(name, _TITLE, LOOK if faults else OK, counts, faults, tables)
    if dataset.images is not None:

        def load(index: int) -> np.ndarray:
            return _load_slice(dataset.images / rows[index].file, rows[index].box)

        check.pictures += [
            functools.partial(_draw, kind, of_kind, load) for kind, of_kind in found.items() if of_kind['suspects']
        ]
    return check


def _draw(kind: str, found: dict, load: Callable[[int], np.ndarray]) -> Picture:
    return create_picture(render_suspects(found, load), f'The {kind} whose labels are the most suspicious')


def _load_slice(path: Path, box: Box) -> np.ndarray:
    """Returns the box of a slice, uint8 [S, S]; black if it cannot be read, which another check reports."""
    try:
        return load_slice(str(path), box, _SIDE)
    except ValueError:
        return np.zeros((_SIDE, _SIDE), np.uint8)
