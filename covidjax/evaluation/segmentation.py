"""Scores of outlined lungs and lesions: the probabilities of a model against the masks of slices and volumes.

`measure_slice` reduces a slice to a few numbers, so that slices need not be in memory together. `score_slices` turns
these into scores at any threshold of `THRESHOLDS`.

Shapes: S side of a slice in pixels, G thresholds.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.data.masked_slices import CONSOLIDATION, LESION, LUNGS
from covidjax.evaluation.overlap import average_by_patient, compute_dice, compute_pointing, compute_rank_auc

THRESHOLDS = (0.002, 0.005, *(i / 100 for i in range(1, 100)))  # of the lesion probability; equal to it is a lesion
LUNGS_THRESHOLD = CONSOLIDATION_THRESHOLD = 0.5
LIMIT = 1.96  # standard deviations of differences, for limits of agreement


class SliceMeasures(NamedTuple):
    """What is kept of a slice.

    Attributes:
      patient: patient ID.
      volume: name of the volume that the slice is of, '' for a single slice.
      pixel_ml: volume of a pixel in millilitres, None if the spacing is unknown.
      lesion: number of outlined pixels, None if the slice has no such mask; the next four are None with it.
      called: number of pixels called lesion at each threshold, int [G].
      hits: those of them that are outlined, int [G].
      auc: area under the ROC curve of the lesion probability over all pixels; None without a lesion.
      pointing: see `overlap.compute_pointing`; None without a lesion.
      auc_in_lungs, grey_auc_in_lungs: the same area over the pixels of the outlined lungs, and that of the grey values
        there; None without a lesion or without a mask of the lungs.
      consolidation: number of outlined pixels, None if there is no such mask; the next two are None with it.
      consolidation_called, consolidation_hits: as for the lesion, int [G].
      lungs: number of outlined pixels, None if there is no such mask.
      lungs_called: number of pixels that the model calls lungs.
      lungs_dice: Dice of the lungs; None without a mask, or if neither has any.
      share: mean over the slice of the lesion probability, outside the model's lungs 0.
    """

    patient: str
    volume: str
    pixel_ml: float | None
    lesion: int | None
    called: np.ndarray | None
    hits: np.ndarray | None
    auc: float | None
    pointing: float | None
    auc_in_lungs: float | None
    grey_auc_in_lungs: float | None
    consolidation: int | None
    consolidation_called: np.ndarray | None
    consolidation_hits: np.ndarray | None
    lungs: int | None
    lungs_called: int
    lungs_dice: float | None
    share: float


def measure_slice(
    probabilities_SxSx3: np.ndarray,
    masks_SxS: np.ndarray,
    known: int,
    grey_SxS: np.ndarray,
    *,
    patient: str,
    volume: str = '',
    spacing_mm: Sequence[float] | None = None,
) -> SliceMeasures:
    """Measures the probabilities of one slice against its masks.

    Args:
      probabilities_SxSx3: of lungs, of lesion, and of consolidation given lesion, float; see
        `preprocess.resize_probabilities`.
      masks_SxS: uint8, the sum of LUNGS, LESION and CONSOLIDATION. Lesions count as lungs.
      known: the sum of the masks that exist for this slice. The others are unknown, not empty.
      grey_SxS: uint8, the input of the model.
      patient: patient ID.
      volume: name of the volume, '' for a single slice.
      spacing_mm: distance between slices, rows and columns of the S x S pixels, if known.

    Raises:
      ValueError: the shapes differ.
    """
    if not probabilities_SxSx3.shape[:2] == masks_SxS.shape == grey_SxS.shape or probabilities_SxSx3.shape[2:] != (3,):
        shapes = probabilities_SxSx3.shape, masks_SxS.shape, grey_SxS.shape
        raise ValueError(f'probabilities [S, S, 3], masks [S, S] and greys [S, S] expected, got {shapes}')
    lungs_SxS, lesion_SxS, consolidation_SxS = np.moveaxis(probabilities_SxSx3, -1, 0)
    is_lesion, is_lungs = (masks_SxS & LESION) > 0, (masks_SxS & (LUNGS | LESION)) > 0
    measures = SliceMeasures(
        patient=patient,
        volume=volume,
        pixel_ml=None if spacing_mm is None else float(np.prod(spacing_mm)) / 1000,
        lungs_called=int((lungs_SxS > LUNGS_THRESHOLD).sum()),
        share=float(np.where(lungs_SxS > LUNGS_THRESHOLD, lesion_SxS, 0).mean(dtype=np.float64)),
        **dict.fromkeys(
            ('lesion', 'called', 'hits', 'auc', 'pointing', 'auc_in_lungs', 'grey_auc_in_lungs', 'consolidation'),
        ),
        **dict.fromkeys(('consolidation_called', 'consolidation_hits', 'lungs', 'lungs_dice')),
    )
    if known & LUNGS:
        measures = measures._replace(
            lungs=int(is_lungs.sum()), lungs_dice=compute_dice(lungs_SxS > LUNGS_THRESHOLD, is_lungs)
        )
    if known & LESION:
        measures = measures._replace(
            lesion=int(is_lesion.sum()), called=_count_called(lesion_SxS), hits=_count_called(lesion_SxS[is_lesion])
        )
    if known & LESION and is_lesion.any():
        measures = measures._replace(
            auc=compute_rank_auc(lesion_SxS, is_lesion), pointing=compute_pointing(lesion_SxS, is_lesion)
        )
        if known & LUNGS:
            inside = is_lesion[is_lungs]
            measures = measures._replace(
                auc_in_lungs=compute_rank_auc(lesion_SxS[is_lungs], inside),
                grey_auc_in_lungs=compute_rank_auc(grey_SxS[is_lungs], inside),
            )
    if known & CONSOLIDATION:
        is_called = consolidation_SxS >= CONSOLIDATION_THRESHOLD
        is_consolidation = (masks_SxS & CONSOLIDATION) > 0
        measures = measures._replace(
            consolidation=int(is_consolidation.sum()),
            consolidation_called=_count_called(lesion_SxS[is_called]),
            consolidation_hits=_count_called(lesion_SxS[is_called & is_consolidation]),
        )
    return measures


def _count_called(probabilities: np.ndarray) -> np.ndarray:
    """Returns how many probabilities reach each threshold, int [G]."""
    reached = np.searchsorted(np.array(THRESHOLDS, probabilities.dtype), probabilities.ravel(), side='right')
    counts = np.bincount(reached, minlength=len(THRESHOLDS) + 1)
    return counts[::-1].cumsum()[::-1][1:]


def choose_lesion_threshold(slices: Sequence[SliceMeasures]) -> float:
    """Returns the threshold with the best mean Dice over the slices with lesions; of equal ones the lowest.

    Raises:
      ValueError: no slice has a lesion.
    """
    dice_NxG = _compute_dice_by_threshold(slices)
    if not len(dice_NxG):
        raise ValueError('no slice with a lesion to choose a threshold on')
    return THRESHOLDS[int(dice_NxG.mean(0).argmax())]


def _compute_dice_by_threshold(slices: Sequence[SliceMeasures]) -> np.ndarray:
    """Returns the Dice of each slice with lesions at each threshold, [N, G]."""
    shown = [s for s in slices if s.lesion]
    return np.array([2 * s.hits / (s.called + s.lesion) for s in shown]).reshape(len(shown), len(THRESHOLDS))


def score_slices(slices: Sequence[SliceMeasures], threshold: float) -> dict[str, Any]:
    """Scores slices and volumes.

    Every score is {'mean', 'low', 'high', 'n'}: the mean over n slices or volumes and its 95 % interval by bootstrap
    over patients. Mean and interval are None where no slice has what the score needs, the interval also for one
    patient.

    Args:
      slices: measures of all slices, at least one; those of a volume in any order.
      threshold: of the lesion probability, one of `THRESHOLDS`; choose it on other patients.

    Returns:
      A JSON-able dict.
      'threshold', and 'best': the threshold that would have been best here, with the 'dice' it reaches;
      means over slices with lesions: 'dice'; 'auc', area under the ROC curve over the pixels of the slice;
      'auc_in_lungs', the same inside the outlined lungs, and 'grey_auc_in_lungs', that of the grey values there;
      'pointing', whether the highest probability lies in a lesion; 'consolidation_dice' (slices with consolidation);
      'lungs_dice': mean over slices;
      'dice_pooled': Dice over the pixels of a volume together, mean over volumes with lesions;
      'infected_slices_auc': area under the ROC curve of the sum of the lesion probability over the model's lungs in a
      slice, for 'shows a lesion'; mean over volumes that have slices of both kinds;
      'false_share': share of the lungs called lesion in slices without lesions, all these slices together; the lungs
      are the outlined ones, or else the model's;
      'volume_error_ml', 'volume_error_percent': predicted less outlined lesion volume, mean over volumes, also with
      'limits', the mean less and plus 1.96 standard deviations (limits of agreement, Bland and Altman 1986), None for
      one volume. Percentages are shares of the lungs: of the outlined ones, and, predicted, of the model's;
      'volumes': 'name', 'patient', 'outlined_ml', 'predicted_ml', 'outlined_percent', 'predicted_percent', 'dice' of
      each volume, None where unknown;
      'num_slices', 'num_lesion_slices', 'num_patients'.

    Raises:
      ValueError: the threshold is not one of `THRESHOLDS`.
    """
    if threshold not in THRESHOLDS:
        raise ValueError(f'threshold {threshold} is none of THRESHOLDS')
    at = THRESHOLDS.index(threshold)
    shown = [s for s in slices if s.lesion]
    dice_NxG = _compute_dice_by_threshold(slices)
    patients = [s.patient for s in shown]
    scores: dict[str, Any] = {
        'threshold': threshold,
        'dice': _average(dice_NxG[:, at].tolist(), patients),
        'best': None,
    }
    if shown:
        best = int(dice_NxG.mean(0).argmax())
        scores['best'] = {'threshold': THRESHOLDS[best], 'dice': _average(dice_NxG[:, best].tolist(), patients)}
    for name in ('auc', 'auc_in_lungs', 'grey_auc_in_lungs', 'pointing'):
        scores[name] = _average([getattr(s, name) for s in shown], patients)
    scores['lungs_dice'] = _average([s.lungs_dice for s in slices], [s.patient for s in slices])
    dense = [s for s in slices if s.consolidation]
    scores['consolidation_dice'] = _average(
        [2 * int(s.consolidation_hits[at]) / int(s.consolidation_called[at] + s.consolidation) for s in dense],
        [s.patient for s in dense],
    )
    free = [s for s in slices if s.lesion == 0]
    lungs = [max(1, s.lungs_called if s.lungs is None else s.lungs) for s in free]
    shares = [int(s.called[at]) / area for s, area in zip(free, lungs, strict=True)]
    scores['false_share'] = _average(shares, [s.patient for s in free], lungs)
    return (
        scores
        | _score_volumes(slices, at)
        | {
            'num_slices': len(slices),
            'num_lesion_slices': len(shown),
            'num_patients': len({s.patient for s in slices}),
        }
    )


def _score_volumes(slices: Sequence[SliceMeasures], at: int) -> dict[str, Any]:
    """Returns the scores of volumes at the threshold of index `at`; see `score_slices`."""
    members: dict[str, list[SliceMeasures]] = {}
    for s in slices:
        if s.volume and s.lesion is not None:
            members.setdefault(s.volume, []).append(s)
    volumes = [_describe_volume(name, of_volume, at) for name, of_volume in members.items()]
    patients = [v['patient'] for v in volumes]
    aucs = [
        compute_rank_auc(np.array([s.share for s in of_volume]), np.array([s.lesion > 0 for s in of_volume]))
        for of_volume in members.values()
    ]
    scores: dict[str, Any] = {
        'dice_pooled': _average([v['dice'] for v in volumes], patients),
        'infected_slices_auc': _average(aucs, patients),
    }
    for unit in ('ml', 'percent'):
        errors = [
            None if v[f'outlined_{unit}'] is None else v[f'predicted_{unit}'] - v[f'outlined_{unit}'] for v in volumes
        ]
        found = np.array([error for error in errors if error is not None])
        limits = None
        if len(found) > 1:
            reach = LIMIT * found.std(ddof=1)
            limits = [float(found.mean() - reach), float(found.mean() + reach)]
        scores[f'volume_error_{unit}'] = _average(errors, patients) | {'limits': limits}
    return scores | {'volumes': volumes}


def _describe_volume(name: str, slices: Sequence[SliceMeasures], at: int) -> dict[str, Any]:
    outlined, called = sum(s.lesion for s in slices), sum(int(s.called[at]) for s in slices)
    hits = sum(int(s.hits[at]) for s in slices)
    sizes = [s.pixel_ml for s in slices]
    result = {'name': name, 'patient': slices[0].patient, 'dice': 2 * hits / (outlined + called) if outlined else None}
    result |= dict.fromkeys(('outlined_ml', 'predicted_ml', 'outlined_percent', 'predicted_percent'))
    if None not in sizes:
        result['outlined_ml'] = float(np.dot([s.lesion for s in slices], sizes))
        result['predicted_ml'] = float(np.dot([int(s.called[at]) for s in slices], sizes))
    if all(s.lungs is not None for s in slices) and sum(s.lungs for s in slices):
        result['outlined_percent'] = 100 * outlined / sum(s.lungs for s in slices)
        # Lesions count as lungs, so the share is at most 100 %.
        result['predicted_percent'] = 100 * called / max(sum(s.lungs_called for s in slices), called, 1)
    return result


def _average(
    values: Sequence[float | None], patients: Sequence[str], weights: Sequence[float] | None = None
) -> dict[str, Any]:
    found = average_by_patient(values, patients, weights=weights)
    known = {patient for patient, value in zip(patients, values, strict=True) if value is not None}
    low, high = found['interval'] if found['interval'] and len(known) > 1 else (None, None)
    return {'mean': found['mean'], 'low': low, 'high': high, 'n': found['number']}
