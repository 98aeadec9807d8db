"""Localisation scores: maps against lesions, and attention over slices against the slices that show a lesion.

A map without preference, flat or all zero, gets the chance level of every score, never NaN.

Shapes: N slices, S their side in pixels, T slices of a scan.
"""

from collections.abc import Sequence

import numpy as np
import scipy

from covidjax.data.lesions import LesionSlice
from covidjax.evaluation.metrics import compute_interval, draw_resamples, group_by_patient

TOP_K = (1, 3, 5)


def compute_pointing(scores: np.ndarray, target: np.ndarray) -> float:
    """Returns 1 if the highest score lies in the target, else 0; for ties, the share inside (Zhang et al. 2018).

    Args:
      scores: float, of any shape.
      target: bool, of the same shape.
    """
    return float(target[scores == scores.max()].mean())


def compute_energy(scores: np.ndarray, target: np.ndarray) -> float:
    """Returns the share of the map's sum that lies in the target (Wang et al. 2020); scores are at least 0."""
    total = scores.sum()
    return float(scores[target].sum() / total) if total > 0 else float(target.mean())


def compute_rank_auc(scores: np.ndarray, target: np.ndarray) -> float | None:
    """Returns the share of (inside, outside) pairs with the higher score inside, ties half; None without such pairs."""
    inside = int(target.sum())
    outside = target.size - inside
    if not inside or not outside:
        return None
    ranks = scipy.stats.rankdata(scores.ravel())[target.ravel()].sum()
    return float((ranks - inside * (inside + 1) / 2) / (inside * outside))


def compute_dice(mask: np.ndarray, target: np.ndarray) -> float | None:
    """Returns the Dice score, twice the overlap over the sum of the areas; None if both are empty."""
    total = int(mask.sum() + target.sum())
    return 2 * int((mask & target).sum()) / total if total else None


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


def average_by_patient(values: Sequence[float | None], patients: Sequence[str], *, seed: int = 0) -> dict:
    """Averages values over the examples that have one.

    Returns:
      {'mean', 'interval', 'number'}, the interval by bootstrap over patients; both None if no example has a value.
    """
    known = [i for i, value in enumerate(values) if value is not None]
    if not known:
        return {'mean': None, 'interval': None, 'number': 0}
    groups = group_by_patient([patients[i] for i in known])
    found = np.array([values[i] for i in known], float)
    sums, counts = np.bincount(groups, found), np.bincount(groups)
    resamples = draw_resamples(len(sums), seed=seed)
    return {
        'mean': float(found.mean()),
        'interval': compute_interval(resamples @ sums / (resamples @ counts)),
        'number': len(known),
    }
