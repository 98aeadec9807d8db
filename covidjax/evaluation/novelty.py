"""Novelty of a slice: Mahalanobis distance of its feature statistics from those of known slices.

The statistics are the mean and standard deviation of every channel of every stage (`outputs.SliceOutputs.statistics`),
each standardised. The embedding is trained to separate the classes and loses other deviations. The covariance is that
of probabilistic PCA (Tipping and Bishop 1999): a few directions with their own variance, one variance for all others.
It can be fitted to fewer examples than dimensions and takes little space.

Shapes: N slices, F statistics, D directions.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covidjax.errors import UserError
from covidjax.evaluation.metrics import group_by_patient
from covidjax.files import replace_file

MAX_DIRECTIONS = 32
MAX_EXAMPLES = 1000
QUANTILE = 0.99
_NUM_FOLDS = 10
_MIN_EXAMPLES = 16


class Novelty(NamedTuple):
    """The distribution of statistics that `fit_novelty` fits.

    Attributes:
      mean, scale: of every statistic [F].
      directions: of standardised statistics [D, F], orthonormal.
      variances: [D], along the directions.
      rest: variance along any other direction.
      threshold: the distance within which `QUANTILE` of the held-out slices lie.
    """

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: np.ndarray
    threshold: np.ndarray


def fit_novelty(statistics_NxF: np.ndarray, patients: Sequence[str]) -> Novelty | None:
    """Fits the distribution to validation slices; the threshold is cross-validated by patient.

    Args:
      statistics_NxF: of slices that the model was not trained on.
      patients: patient of each slice.

    Returns:
      The distribution; None with fewer than 16 slices or 4 patients, or if all slices are alike.
    """
    groups = group_by_patient(patients)
    if len(groups) < _MIN_EXAMPLES or groups.max() < 3 or not statistics_NxF.std(0).any():
        return None
    held_out = np.empty(len(groups))
    folds = groups % _NUM_FOLDS
    for fold in np.unique(folds):
        inside = folds != fold
        held_out[~inside] = measure_distance(fit_distribution(statistics_NxF[inside]), statistics_NxF[~inside])
    return fit_distribution(statistics_NxF)._replace(threshold=np.float32(np.quantile(held_out, QUANTILE)))


def fit_distribution(x_NxF: np.ndarray) -> Novelty:
    """Fits the distribution to statistics of at least 4 slices, with the threshold 1."""
    from sklearn.decomposition import PCA  # Slow to import, and predictions fit nothing.

    x_NxF = x_NxF.astype(np.float64)
    mean, scale = x_NxF.mean(0), x_NxF.std(0)
    scale = scale.clip(0.01 * scale.mean())  # channels that hardly ever fire have a deviation near 0
    count = min(MAX_DIRECTIONS, len(x_NxF) // 4, x_NxF.shape[1] - 1)
    pca = PCA(count, svd_solver='full').fit((x_NxF - mean) / scale)
    floor = 1e-6 * pca.explained_variance_[0]
    variances, rest = pca.explained_variance_.clip(floor), max(pca.noise_variance_, floor)
    return Novelty(*(np.asarray(a, np.float32) for a in (mean, scale, pca.components_, variances, rest, 1)))


def measure_distance(novelty: Novelty, x_NxF: np.ndarray) -> np.ndarray:
    """Returns the Mahalanobis distance of each slice [N]."""
    centred = (x_NxF.astype(np.float64) - novelty.mean) / novelty.scale
    along = centred @ novelty.directions.T
    rest = np.maximum((centred**2).sum(1) - (along**2).sum(1), 0)
    return np.sqrt((along**2 / novelty.variances).sum(1) + rest / novelty.rest)


def compute_novelty(novelty: Novelty, statistics_NxF: np.ndarray) -> np.ndarray:
    """Returns the distance of each slice divided by the threshold [N]; above 1 the slice is unusual."""
    return measure_distance(novelty, statistics_NxF) / novelty.threshold


def save_novelty(path: Path, novelty: Novelty) -> None:
    """Writes an .npz file atomically."""
    with replace_file(path) as temporary, temporary.open('wb') as file:
        np.savez(file, **novelty._asdict())


def load_novelty(path: Path) -> Novelty | None:
    """Returns what `save_novelty` wrote, None if there is no such file.

    Raises:
      UserError: the file is damaged or of an earlier version.
    """
    try:
        with path.open('rb') as file, np.load(file) as arrays:
            return Novelty(*(arrays[name] for name in Novelty._fields))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path} is damaged or of an earlier version: run --mode=evaluate to write it again') from error
