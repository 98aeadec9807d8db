"""Logits of a whole split, each example once, and the predictions.csv of a run."""

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy

from covidjax.files import replace_file


def compute_logits(
    apply: Callable[[dict, dict], jax.Array], variables: dict, batches: Iterable[dict], num_examples: int
) -> np.ndarray:
    """Returns the logits of a split without those of the padding.

    Args:
      apply: compiled (variables, batch) -> logits [B, K] of the global batch, on every process.
      variables: the model's.
      batches: see `data.loader.load_eval_batches`, on the devices.
      num_examples: N; later rows are padding.

    Returns:
      float32 [N, K], in the order of the batches.
    """
    results = [np.asarray(logits) for logits in read_late(apply(variables, batch) for batch in batches)]
    return np.concatenate(results)[:num_examples]


def read_late(items: Iterable[Any]) -> Iterator[Any]:
    """Yields items, each after the next one was started, so that the device computes while an item is read."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def softmax(logits_NxK: np.ndarray) -> np.ndarray:
    """Returns probabilities [N, K] in float64."""
    return scipy.special.softmax(logits_NxK.astype(np.float64), axis=1)


def write_predictions(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes predictions.csv: a column per name, a row per example, floats with nine decimals."""
    with replace_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in zip(*columns.values(), strict=True):
            writer.writerow([f'{value:.9f}' if isinstance(value, float) else value for value in row])
