"""Outlines the lungs and lesions of a scan and measures what it carries.

Shapes: T slices of a scan, S side of a slice as the model sees it, h = S / 4.
"""

from pathlib import Path

import numpy as np

from covidjax.evaluation.burden import Burden, measure_burden
from covidjax.evaluation.outlines import outline_slices
from covidjax.evaluation.sick import Found, compute_features
from covidjax.models.lesion_weights import LesionModel
from covidjax.predict.masks import label_slice
from covidjax.predict.prepare import PreparedScan
from covidjax.report.burden import Outlined, ShownSlice

_NUM_SHOWN = 8


def outline_scan(lesions: LesionModel, prepared: PreparedScan) -> Outlined:
    """Outlines the whole slices of a scan that was prepared for it.

    Args:
      lesions: the model.
      prepared: with `whole` slices.
    """
    grid = prepared.volume.lungs
    probabilities = outline_slices(lesions, prepared.whole)
    burden = measure_burden(probabilities, grid, prepared.volume.depths_mm, threshold=lesions.threshold)
    shown = []
    for place in choose_slices(burden):
        of_slice = None if grid is None else grid.enlarge(burden.lungs_txGxV[place // grid.steps[0]])
        labels = label_slice(probabilities[place], of_slice, burden.threshold, prepared.whole[place].shape)
        shown.append(ShownSlice(place + 1, prepared.whole[place], labels))
    summary = {
        'model': Path(lesions.name).name,  # not where it lies on this machine
        'digest': lesions.digest,
        'trained_on_phantoms': bool(lesions.notice),
        **burden.to_json(),
    }
    return Outlined(summary, burden, probabilities, _compute_features(burden), shown)


def _compute_features(burden: Burden) -> np.ndarray:
    found = [(s.lungs_percent, s.lungs_percent * s.lesions_percent / 100, s.peak) for s in burden.slices]
    return compute_features(Found(*np.array(found).T))


def compute_view_features(lesions: LesionModel, prepared: PreparedScan, whole_MxSxS: np.ndarray) -> np.ndarray:
    """Returns `sick.compute_features` of a scan through another window; each of its slices stands for `step` slices.

    Args:
      lesions: the model.
      prepared: the scan.
      whole_MxSxS: every `step`-th slice through that window, from `PreparedScan.views`.
    """
    grid, num_slices = prepared.volume.lungs, len(prepared.whole)
    probabilities = np.repeat(outline_slices(lesions, whole_MxSxS), prepared.views.step, axis=0)[:num_slices]
    burden = measure_burden(probabilities, grid, prepared.volume.depths_mm, threshold=lesions.threshold)
    return _compute_features(burden)


def choose_slices(burden: Burden) -> list[int]:
    """Returns the indices of the slices to show: spread over the infected ones, or else over those with lungs."""
    chosen = [s.number - 1 for s in burden.slices if s.is_infected]
    chosen = chosen or [s.number - 1 for s in burden.slices if s.lungs_percent > 0]
    chosen = chosen or [s.number - 1 for s in burden.slices]
    places = np.unique(np.linspace(0, len(chosen) - 1, _NUM_SHOWN).round().astype(int))
    return [chosen[i] for i in places]
