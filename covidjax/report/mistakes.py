"""Report section: the most confident mistakes on the test split."""

from collections.abc import Callable, Sequence

import numpy as np

from covidjax.data.lists import CLASSES
from covidjax.report import pictures
from covidjax.report.charts import create_picture
from covidjax.report.page import Table
from covidjax.report.sections import Section

NUM_SHOWN = 9
_MAX_PER_PATIENT = 2


def find_confident_mistakes(
    probabilities_NxK: np.ndarray, labels_N: np.ndarray, count: int, patients: Sequence[str]
) -> list[int]:
    """Returns indices of up to `count` wrong predictions, most confident first, at most two per patient."""
    predicted, confidence = probabilities_NxK.argmax(1), probabilities_NxK.max(1)
    chosen, seen = [], {}
    for i in np.argsort(-confidence, kind='stable').tolist():
        if len(chosen) == count:
            break
        if predicted[i] != labels_N[i] and seen.get(patients[i], 0) < _MAX_PER_PATIENT:
            seen[patients[i]] = seen.get(patients[i], 0) + 1
            chosen.append(i)
    return chosen


def build_mistakes(
    probabilities_NxK: np.ndarray,
    labels_N: np.ndarray,
    patients: Sequence[str],
    names: Sequence[str],
    load_image: Callable[[int], np.ndarray],
    *,
    what: str,
    column: str,
    note: str,
) -> Section:
    """Returns the section 'mistakes': pictures and a table, or one sentence if there are none.

    Args:
      probabilities_NxK: predicted, of the test examples.
      labels_N: int, 0 .. K-1.
      patients: patient of each example.
      names: name of each example.
      load_image: index of an example -> one of its slices, uint8 [S, S].
      what: 'slice' or 'scan', the kind of example.
      column: heading of the names in the table.
      note: paragraph above the pictures.
    """
    title = 'Most confident mistakes'
    mistakes = find_confident_mistakes(probabilities_NxK, labels_N, NUM_SHOWN, patients)
    if not mistakes:
        return Section('mistakes', title, [f'No test {what} is classified wrongly.'])
    examples, rows = [], []
    for i in mistakes:
        true, called, share = CLASSES[labels_N[i]], CLASSES[probabilities_NxK[i].argmax()], probabilities_NxK[i].max()
        examples.append(pictures.Example(f'{true}, predicted\n{called} {share:.2f}', load_image(i)))
        rows.append((names[i], true, called, float(share)))
    return Section(
        'mistakes',
        title,
        [
            note,
            create_picture(pictures.render_panels({'': examples}, 3), 'The most confident mistakes'),
            Table('Mistakes by predicted probability', (column, 'true', 'predicted', 'probability'), rows),
        ],
    )
