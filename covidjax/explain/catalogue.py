"""The maps of a slice model by name: attention, evidence, both inside the lungs, and controls that use no model.

Shapes: N slices, S their side.
"""

from collections.abc import Mapping

import numpy as np
import scipy

from covidjax.data.slice_lungs import find_lungs_in_slice
from covidjax.explain.evidence import combine_evidence, contrast, remove_attention, spread
from covidjax.explain.localisation import create_centre_map
from covidjax.explain.maps import Explanations, combine_attention, draw_random_maps, scale_to_unit, upsample

LESIONS = 'lesions of the lesion model'
IN_LUNGS = ', inside the lungs'
CENTRE, RANDOM, FLAT = 'always the centre', 'random map', 'no preference'
GREY, SMOOTH_GREY = 'grey', 'smoothed grey'
# Grey values are scored inside the lungs only: outside them, the body is brighter than any lesion.
CONTROLS = (CENTRE, RANDOM, FLAT + IN_LUNGS, GREY + IN_LUNGS, SMOOTH_GREY + IN_LUNGS)
_FLOOR = 0.02  # the lowest value inside the lungs: above the 0 outside
_SMOOTHING = 1 / 40  # standard deviation, as a share of the side


def compute_maps(explained: Explanations, size: int, combination: str) -> dict[str, np.ndarray]:
    """Returns the maps of N slices by name: float [N, size, size], each scaled to [0, 1].

    - 'attention 1', 'attention 2': of each module; 'attention 1 x 2': their combination.
    - 'evidence': of both modules; 'evidence 1': of module 1, whose grid is finer; 'unweighted evidence 1': <w_c, x_i>.
      Each for the predicted class, for COVID-19 less pneumonia and for sick less normal.
    - LESIONS: lesion probability by a lesion model, if it was applied. It shows what decides on sick or not in a
      verdict that stands on lesions, not what the classifier looks at.
    """
    maps = {
        'attention 1': scale_to_unit(upsample(explained.attention[0], size)),
        'attention 2': scale_to_unit(upsample(explained.attention[1], size)),
        'attention 1 x 2': combine_attention(explained.attention, size),
    }
    called = explained.probabilities.argmax(1)
    shares = {
        'evidence': combine_evidence(explained.evidence, size, combination),
        'evidence 1': spread(explained.evidence[0], size),
        'unweighted evidence 1': spread(remove_attention(explained.evidence[0], explained.attention[0]), size),
    }
    for kind, evidence in shares.items():
        # In float32, scaling would round the small shares of a map to one value.
        for compared, values in contrast(np.asarray(evidence, np.float64), called).items():
            maps[f'{kind}, {compared}'] = scale_to_unit(values)
    if explained.lesions is not None:
        maps[LESIONS] = scale_to_unit(upsample(explained.lesions, size))
    return maps


def find_lungs(images: np.ndarray) -> np.ndarray:
    """Returns the lungs of slices uint8 [N, S, S, 1], bool [N, S, S]; all True where none are found."""
    found = [find_lungs_in_slice(image[..., 0]) for image in images]
    whole = np.ones(images.shape[1:3], bool)
    return np.stack([whole if lungs is None else lungs for lungs in found])


def restrict(maps: Mapping[str, np.ndarray], lungs: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the maps inside the lungs: scaled to [0.02, 1] there, 0 outside. Their names end with IN_LUNGS."""
    return {
        name + IN_LUNGS: np.where(lungs, _FLOOR + (1 - _FLOOR) * _scale_inside(values, lungs), 0)
        for name, values in maps.items()
    }


def _scale_inside(maps: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    lowest = np.where(lungs, maps, np.inf).min((1, 2), keepdims=True)
    return scale_to_unit(np.where(lungs, maps, lowest))


def compute_map(name: str, explained: Explanations, images: np.ndarray, combination: str) -> np.ndarray:
    """Returns the map `name` of `compute_maps` or `restrict` of slices uint8 [N, S, S]: float [N, S, S] in [0, 1]."""
    whole = name.removesuffix(IN_LUNGS)
    maps = compute_maps(explained, images.shape[1], combination)
    if whole != name:
        maps = restrict({whole: maps[whole]}, find_lungs(images[..., np.newaxis]))
    return maps[name]


def compute_controls(images: np.ndarray, lungs: np.ndarray, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns CONTROLS, and 'no preference' and the random map inside the lungs, by name: float [N, S, S] in [0, 1]."""
    count, size = images.shape[:2]
    grey = images[..., 0] / 255
    smooth = np.stack([scipy.ndimage.gaussian_filter(image, size * _SMOOTHING) for image in grey])
    everywhere = {
        CENTRE: np.repeat(create_centre_map(size)[np.newaxis], count, axis=0),
        RANDOM: draw_random_maps(count, size, seed=seed),
        FLAT: np.zeros((count, size, size)),
    }
    inside = {RANDOM: everywhere[RANDOM], FLAT: everywhere[FLAT], GREY: grey, SMOOTH_GREY: smooth}
    return {**everywhere, **restrict(inside, lungs)}
