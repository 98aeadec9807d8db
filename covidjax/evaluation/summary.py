"""The scores of a list, of which every report has the same: a run's own test list, and data from elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covidjax.evaluation.curves import compute_curves
from covidjax.evaluation.metrics import compute_metrics
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.screening import evaluate_rules


def summarise(
    rules: dict[str, Any],
    logits_NxK: np.ndarray,
    labels_N: np.ndarray,
    patients: Sequence[str],
    classes: Sequence[str],
    *,
    baselines: Mapping[str, np.ndarray],
    train_shares_K: Sequence[float],
) -> dict[str, Any]:
    """Computes the scores of a classifier and of its baselines on N examples.

    Args:
      rules: of `screening.fit_rules`.
      logits_NxK: of the classifier.
      labels_N: int, 0 .. K-1.
      patients: patient of each example.
      classes: K names.
      baselines: name -> scores [N, K] of a trivial classifier.
      train_shares_K: class shares of the training list.

    Returns:
      A JSON-able dict: those of `compute_metrics`; 'baselines', the same by name; 'curves' (`compute_curves`);
      'screening' (`evaluate_rules`).
    """
    probabilities = softmax(logits_NxK)
    return {
        **compute_metrics(labels_N, probabilities.argmax(1), patients, classes),
        'baselines': {
            name: compute_metrics(labels_N, scores.argmax(1), patients, classes) for name, scores in baselines.items()
        },
        'curves': compute_curves(labels_N, probabilities, patients, classes),
        'screening': evaluate_rules(rules, logits_NxK, labels_N, patients, classes, train_shares_K=train_shares_K),
    }
