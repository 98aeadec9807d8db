"""Pictures of a scan for the viewer: its slices, the leading map of the run, the lungs and the lesions.

Shapes: T slices of a scan, H rows, W columns, N slices that the model saw, S their side.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from covidjax.data.preprocess import encode_png
from covidjax.data.scan.volume import Volume
from covidjax.evaluation.outputs import apply_in_batches
from covidjax.explain import catalogue
from covidjax.explain.maps import Explanations
from covidjax.predict.masks import create_labels
from covidjax.report.burden import LesionPrediction
from covidjax.report.leading import get_classifier_map
from covidjax.report.prediction import Prediction

_BATCH_SIZE = 16


def write_pictures(
    folder: Path, volume: Volume, prediction: Prediction | LesionPrediction, results: dict[str, Any]
) -> dict[str, Any]:
    """Writes slices/1.png ..., and maps/, lungs/ and lesions/ with pictures of the same names where there are such.

    All are grey. A slice is H x W, windowed as the model saw it. Lungs and lesions are of the same size: 0 or 255, and
    80 times a key of `masks.LABELS`. A map is S x S and covers the box of its slice in prediction.json. There is one
    for each slice that the model saw.

    Args:
      folder: existing folder.
      volume: the whole scan.
      prediction: its prediction.
      results: results.json of the run.

    Returns:
      'map', the name of the leading map, None if none beats chance or the best is that of the lesion model; 'has_lungs'
      and 'has_lesions'; 'is_windowed', whether the greys are Hounsfield units in the window of COVIDx.
    """
    everywhere = range(len(volume.slices))
    _write(folder / 'slices', everywhere, volume.slices.__getitem__)
    shown = None if isinstance(prediction, LesionPrediction) else get_classifier_map(results)
    if shown is not None:
        maps_NxSxS = compute_leading_maps(prediction, shown)
        places = prediction.used.tolist()
        _write(folder / 'maps', places, dict(zip(places, maps_NxSxS, strict=True)).__getitem__)
    grid, outlined = volume.lungs, prediction.outlined
    if grid is not None:
        layers = grid.lungs_txhxw
        _write(folder / 'lungs', everywhere, lambda t: grid.enlarge(layers[t // grid.steps[0]]).astype(np.uint8) * 255)
    if outlined is not None:
        shapes = [grey.shape for grey in volume.slices]
        labels = create_labels(outlined.probabilities, outlined.burden, grid, shapes)
        _write(folder / 'lesions', everywhere, lambda t: labels[t] * np.uint8(80))
    return {
        'map': shown,
        'has_lungs': grid is not None,
        'has_lesions': outlined is not None,
        'is_windowed': volume.kind != 'images',
    }


def _write(folder: Path, places: Any, get_pixels: Callable[[int], np.ndarray]) -> None:
    folder.mkdir()
    for place in places:
        (folder / f'{place + 1}.png').write_bytes(encode_png(get_pixels(place)))


def compute_leading_maps(prediction: Prediction, name: str) -> np.ndarray:
    """Returns the map `name` of `catalogue.compute_maps` or of `restrict` for each slice: uint8 [N, S, S]."""
    explained = prediction.explained
    draw = functools.partial(_compute_maps, name, prediction.combination)
    arrays = explained.probabilities, *explained.attention, *explained.evidence
    return apply_in_batches(draw, _BATCH_SIZE, prediction.images, *arrays)


def _compute_maps(name: str, combination: str, images: np.ndarray, probabilities: np.ndarray, *parts) -> np.ndarray:
    maps = catalogue.compute_map(name, Explanations(probabilities, parts[:2], parts[2:]), images, combination)
    return (maps * 255).round().astype(np.uint8)
