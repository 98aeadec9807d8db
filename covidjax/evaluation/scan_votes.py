"""A verdict on a whole scan from a slice model's votes: the rule and its calibration, chosen on validation scans.

Shapes: M scans, T slices of a scan, N slices of all scans, K classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from covidjax.data.lists import CLASSES
from covidjax.data.scans import Scan
from covidjax.evaluation import voting
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.screening import fit_rules

_TINY = 1e-12  # below every probability that means something; log(0) means nothing


def fit_vote_rules(logits_NxK: np.ndarray, scans: Sequence[Scan], temperature: float) -> dict[str, Any]:
    """Chooses how slices vote, and fits the rules of `screening.fit_rules` to the votes.

    Args:
      logits_NxK: of the slices of a split that the model was not trained on.
      scans: of that split, whole.
      temperature: of slices.

    Returns:
      The rules, with 'rule' and the 'validation_accuracy' of every rule.
    """
    slice_logits = [logits_NxK[list(scan.records)] for scan in scans]
    labels = np.array([scan.label for scan in scans])
    rule, accuracies = voting.choose_rule([apply_temperature(x, temperature) for x in slice_logits], labels)
    votes = np.stack([compute_vote_logits(x, temperature, rule) for x in slice_logits])
    rules = fit_rules(votes, labels, [scan.patient for scan in scans], CLASSES)
    return {'rule': rule, 'validation_accuracy': accuracies, **rules}


def compute_vote_logits(logits_TxK: np.ndarray, temperature: float, rule: str) -> np.ndarray:
    """Returns the logarithm of a scan's votes [K], which stands for logits of the scan."""
    return np.log(np.maximum(voting.vote(apply_temperature(logits_TxK, temperature), rule), _TINY))
