"""Labels that are probably wrong, found by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

The few lines that are needed are here because the package cleanlab requires pandas.

Shapes: N examples, K classes.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.data.lists import CLASSES

MAX_LISTED = 1000  # suspects that a result names


class Suspects(NamedTuple):
    """Examples whose label is probably wrong, most suspicious first.

    Attributes:
      places: index of each suspect, int [S].
      suggested: the class that the model suggests instead, int [S].
      margins: probability of the label less that of the suggested class, below 0, [S].
      thresholds: mean probability of each class over its own examples [K]; NaN for a class without examples.
      joint: confident joint: examples by label (rows) and by confident class, int [K, K].
    """

    places: np.ndarray
    suggested: np.ndarray
    margins: np.ndarray
    thresholds: np.ndarray
    joint: np.ndarray


def find_suspects(probabilities_NxK: np.ndarray, labels_N: np.ndarray) -> Suspects:
    """Finds as many suspects as the confident joint says that there are (pruning by noise rate).

    An example counts for the most probable class among those whose probability reaches their threshold: that gives the
    confident joint. Its rows are scaled to the number of examples of each label, which says how many examples labelled
    a are really b. That many, with the largest differences of the probabilities of b and a, are suspects if b is more
    probable than a.

    Args:
      probabilities_NxK: by models that were not trained on the example.
      labels_N: int, 0 .. K-1.
    """
    k = probabilities_NxK.shape[1]
    thresholds = np.array(
        [probabilities_NxK[labels_N == c, c].mean() if (labels_N == c).any() else np.nan for c in range(k)]
    )
    reached = probabilities_NxK >= np.where(np.isnan(thresholds), np.inf, thresholds)
    confident = np.where(reached, probabilities_NxK, -1).argmax(1)
    counted = reached.any(1)
    joint = np.zeros((k, k), int)
    np.add.at(joint, (labels_N[counted], confident[counted]), 1)
    margins, suggested = np.zeros(len(labels_N)), np.full(len(labels_N), -1)
    for label, other in itertools.permutations(range(k), 2):
        of_label = np.flatnonzero(labels_N == label)
        number = round(len(of_label) * joint[label, other] / max(joint[label].sum(), 1))
        differences = probabilities_NxK[of_label, label] - probabilities_NxK[of_label, other]
        first = np.argsort(differences, kind='stable')[:number]
        first = first[differences[first] < margins[of_label[first]]]
        margins[of_label[first]], suggested[of_label[first]] = differences[first], other
    places = np.flatnonzero(suggested >= 0)
    places = places[np.argsort(margins[places], kind='stable')]
    return Suspects(places, suggested[places], margins[places], thresholds, joint)


def describe_label_errors(
    probabilities_NxK: np.ndarray,
    labels_N: np.ndarray,
    names: Sequence[str],
    patients: Sequence[str],
    scans: Sequence[str] | None,
) -> dict[str, Any]:
    """Finds slices and scans whose label is probably wrong; a scan has the mean probabilities of its slices.

    Args:
      probabilities_NxK: by models that were not trained on the example.
      labels_N: int, 0 .. K-1.
      names: file or scan of each example.
      patients: patient of each example.
      scans: scan of each slice; None if the examples are scans.

    Returns:
      A JSON-able dict: 'slices' (without them, absent) and 'scans', each {num_examples, num_suspects, thresholds by
      class, joint, suspects: [{name, patient, label, suggested, margin, shown}]}, the `MAX_LISTED` most suspicious
      first. 'shown' is the index of the example that shows the suspect: of a scan, the slice that speaks most for the
      suggested class. A scan with two labels counts as two.
    """
    if scans is None:
        return {'scans': _describe(find_suspects(probabilities_NxK, labels_N), labels_N, names, patients)}
    members: dict[tuple[str, int], list[int]] = {}
    for i, key in enumerate(zip(scans, labels_N.tolist(), strict=True)):
        members.setdefault(key, []).append(i)
    means = np.stack([probabilities_NxK[of_scan].mean(0) for of_scan in members.values()])
    scan_labels = np.array([label for _, label in members])
    of_scans = _describe(
        find_suspects(means, scan_labels),
        scan_labels,
        [scan for scan, _ in members],
        [patients[of_scan[0]] for of_scan in members.values()],
    )
    every = list(members.values())
    for suspect in of_scans['suspects']:
        of_scan = every[suspect['shown']]
        suggested = CLASSES.index(suspect['suggested'])
        suspect['shown'] = of_scan[int(probabilities_NxK[of_scan, suggested].argmax())]
    return {
        'slices': _describe(find_suspects(probabilities_NxK, labels_N), labels_N, names, patients),
        'scans': of_scans,
    }


def _describe(
    suspects: Suspects, labels_N: np.ndarray, names: Sequence[str], patients: Sequence[str]
) -> dict[str, Any]:
    return {
        'num_examples': len(labels_N),
        'num_suspects': len(suspects.places),
        'thresholds': {
            name: None if np.isnan(t) else float(t) for name, t in zip(CLASSES, suspects.thresholds, strict=True)
        },
        'joint': suspects.joint.tolist(),
        'suspects': [
            {
                'name': names[place],
                'patient': patients[place],
                'label': CLASSES[labels_N[place]],
                'suggested': CLASSES[suggested],
                'margin': margin,
                'shown': place,
            }
            for place, suggested, margin in zip(
                *(values[:MAX_LISTED].tolist() for values in (suspects.places, suspects.suggested, suspects.margins)),
                strict=True,
            )
        ],
    }
