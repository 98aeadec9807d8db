"""Disagreement between the members of an ensemble, and the limit beyond which a prediction is uncertain.

Shapes: M members, N examples, K classes.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from covidjax.evaluation.conformal import compute_rank

# Share of the out-of-fold examples within the limit. They have two members, whose distance scatters more than the mean
# over the pairs of an ensemble: with 0.95, no test slice of five folds on real slices was beyond the limit.
SHARE = 0.8
RULE = (
    'Disagreement is the mean over pairs of members of half the summed absolute differences of their calibrated '
    'probabilities, from 0 to 1. The limit was chosen on the {count:,} out-of-fold examples that two members did not '
    'train on, the one that held the example out and the one that validated on it: {share:.0%} of them lie within it.'
)


def compute_disagreement(probabilities_MxNxK: np.ndarray) -> np.ndarray:
    """Returns the mean total variation distance of two members [N], from 0 (equal) to 1 (certain of other classes).

    The mean over pairs has the same expectation for any number of members, at least 2.
    """
    pairs = itertools.combinations(probabilities_MxNxK, 2)
    return np.mean([np.abs(first - second).sum(-1) / 2 for first, second in pairs], axis=0)


def fit_limit(disagreement_N: np.ndarray, patients: Sequence[str]) -> dict:
    """Chooses the limit on out-of-fold examples.

    It is the ceil((n + 1) * SHARE)-th smallest of n values. A new example that is exchangeable with these exceeds it
    with a probability of at most 1 - SHARE, if it has two members. More members average their differences and exceed
    it more rarely.

    Args:
      disagreement_N: between two members that did not train on the example.
      patients: patient of each example.

    Returns:
      A JSON-able dict: 'share', 'limit' (None if there are too few examples), 'num_examples', 'num_patients', and
      'rule' or 'note', a sentence.
    """
    count = len(disagreement_N)
    rank = compute_rank(count, SHARE)
    found = {'share': SHARE, 'limit': None, 'num_examples': count, 'num_patients': len(set(patients))}
    if rank > count:
        note = f'{count} out-of-fold examples are too few for a limit on the disagreement of the members.'
        return found | {'note': note}
    limit = float(np.sort(disagreement_N)[rank - 1])
    return found | {'limit': limit, 'rule': RULE.format(share=SHARE, count=count)}
