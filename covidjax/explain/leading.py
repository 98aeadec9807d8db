"""Which map of a slice model leads: chosen on some slices, measured against chance on others.

A map leads only if it beats chance there. Otherwise no map of the model is an explanation.

Shapes: N slices, M measures of a map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covidjax.evaluation.overlap import average_by_patient
from covidjax.explain.catalogue import CENTRE, FLAT, IN_LUNGS, RANDOM, SMOOTH_GREY

MEASURES = {'lesions': ('pointing', 'auc'), 'erasure': ('insertion_less_deletion',)}
# In the choice. The pointing game rests on one pixel, so it varies several times as much between slices.
_WEIGHTS = {'lesions': (0.5, 1.0), 'erasure': (1.0,)}


def name_references(name: str, by: str) -> dict[str, str]:
    """Returns the controls that a map is compared with: 'chance', 'centre', 'grey' and, inside the lungs, 'lungs'.

    Chance is no preference for lesions, and a random map for erasure. Lesions are in the lungs, so a map inside the
    lungs beats chance even if it has no preference there: 'lungs' is chance inside the lungs.

    Args:
      name: of the map.
      by: key of MEASURES.
    """
    chance = FLAT if by == 'lesions' else RANDOM
    references = {'chance': chance, 'centre': CENTRE, 'grey': SMOOTH_GREY + IN_LUNGS}
    return references | ({'lungs': chance + IN_LUNGS} if name.endswith(IN_LUNGS) else {})


def choose_map(scores: Mapping[str, np.ndarray], by: str) -> str:
    """Returns the map with the highest weighted sum of its mean measures; `scores` maps names to [N, M]."""
    return max(scores, key=lambda name: scores[name].mean(0) @ _WEIGHTS[by])


def measure_lead(scores: Mapping[str, np.ndarray], name: str, by: str, patients: Sequence[str]) -> dict[str, Any]:
    """Compares the chosen map with its controls on slices that had no part in the choice.

    Args:
      scores: name -> measures [N, M] of the map and of its controls.
      name: of the chosen map.
      by: key of MEASURES.
      patients: of the N slices.

    Returns:
      'name', the map if it beats chance, else None. The intervals of all margins over chance must lie above 0 and, for
      a map inside the lungs, that of the last measure over chance inside the lungs. One patient is not enough;
      'best', the map; 'by'; 'num_slices', 'num_patients';
      'scores', measure -> mean and interval; 'margins', control -> measure -> mean and interval of the difference per
      slice. Intervals are by bootstrap over patients.
    """

    def average(values_NxM: np.ndarray) -> dict[str, dict]:
        return {
            measure: average_by_patient(values.tolist(), patients)
            for measure, values in zip(MEASURES[by], values_NxM.T, strict=True)
        }

    margins = {
        reference: average(scores[name] - scores[control]) for reference, control in name_references(name, by).items()
    }
    num_patients = len(set(patients))
    required = [*margins['chance'].values(), *(margins[m][MEASURES[by][-1]] for m in margins if m == 'lungs')]
    beats = num_patients > 1 and all(margin['interval'][0] > 0 for margin in required)
    return {
        'name': name if beats else None,
        'best': name,
        'by': by,
        'num_slices': len(patients),
        'num_patients': num_patients,
        'scores': average(scores[name]),
        'margins': margins,
    }


def split_patients(patients: Sequence[str]) -> tuple[list[int], list[int]]:
    """Returns the slices of every second patient, to choose a map on, and the others, to measure it on."""
    order = list(dict.fromkeys(patients))
    first = set(order[::2])
    numbers = range(len(patients))
    return [i for i in numbers if patients[i] in first], [i for i in numbers if patients[i] not in first]
