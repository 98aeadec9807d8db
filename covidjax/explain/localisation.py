"""Localisation scores: maps against lesions, and attention over slices against the slices that show a lesion.

A map without preference, flat or all zero, gets the chance level of every score, never NaN.

Shapes: N slices, S their side in pixels, T slices of a scan.
"""

from collections.abc import Sequence

import numpy as np

from covidjax.data.lesions import LesionSlice
from covidjax.evaluation.overlap import (
    average_by_patient,
    compute_dice,
    compute_energy,
    compute_pointing,
    compute_rank_auc,
)

TOP_K = (1, 3, 5)


def create_centre_map(size: int) -> np.ndarray:
    """Returns a map highest at the centre: a Gaussian with a standard deviation of size / 4, [S, S]."""
    x = (np.arange(size) + 0.5) / size - 0.5
    return np.exp(-8 * (x[:, None] ** 2 + x**2))


def score_maps(maps: np.ndarray, masks: np.ndarray, slices: Sequence[LesionSlice]) -> dict[str, dict]:
    """Scores maps against the lesions of their slices.

    Args:
      maps: at least 0, float [N, S, S].
      masks: the regions that the maps mark, bool [N, S, S].
      slices: N slices with lesions.

    Returns:
      'pointing', 'energy_lesion', 'energy_lung', 'auc' and 'dice' (of the masks), each an `average_by_patient`.
    """
    patients = [s.patient for s in slices]
    by_slice = score_each(maps, masks, slices)
    return {name: average_by_patient(values, patients) for name, values in by_slice.items()}


def score_each(maps: np.ndarray, masks: np.ndarray, slices: Sequence[LesionSlice]) -> dict[str, list[float | None]]:
    """Returns the scores of `score_maps` for each slice; None where a score does not exist."""
    return {
        'pointing': [compute_pointing(m, s.lesion) for m, s in zip(maps, slices, strict=True)],
        'energy_lesion': [compute_energy(m, s.lesion) for m, s in zip(maps, slices, strict=True)],
        'energy_lung': [
            None if s.lung is None else compute_energy(m, s.lung) for m, s in zip(maps, slices, strict=True)
        ],
        'auc': [compute_rank_auc(m, s.lesion) for m, s in zip(maps, slices, strict=True)],
        'dice': [compute_dice(m, s.lesion) for m, s in zip(masks, slices, strict=True)],
    }


def score_slice_attention(attention: Sequence[np.ndarray], shows_lesion: Sequence[np.ndarray]) -> dict[str, dict]:
    """Scores attention over slices against the slices that show a lesion, scan by scan.

    Scans in which all slices show a lesion, or none does, are left out.

    Args:
      attention: per scan float [T].
      shows_lesion: per scan bool [T].

    Returns:
      'auc' and, for k in TOP_K, 'hit@k' (the share of scans with a lesion among the k highest slices) and 'chance@k'
      (the expected hit of k slices drawn at random), each averaged by `average_by_patient` with every scan a patient.
    """
    pairs = [(a, y) for a, y in zip(attention, shows_lesion, strict=True) if 0 < y.sum() < len(y)]
    scans = [str(i) for i in range(len(pairs))]
    results = {'auc': average_by_patient([compute_rank_auc(a, y) for a, y in pairs], scans)}
    for k in TOP_K:
        hits = [float(y[np.argsort(-a, kind='stable')[:k]].any()) for a, y in pairs]
        results[f'hit@{k}'] = average_by_patient(hits, scans)
        missed = [
            np.prod([max(len(y) - y.sum() - i, 0) / (len(y) - i) for i in range(min(k, len(y)))]) for _, y in pairs
        ]
        results[f'chance@{k}'] = average_by_patient([1 - m for m in missed], scans)
    return results
