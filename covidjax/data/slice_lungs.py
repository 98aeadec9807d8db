"""Finds the lungs in a slice without Hounsfield units, and cuts slices to them.

There are two ways:
- `find_lungs_in_slice` uses the lesion model of this package. It cuts slices (`data.region=lungs`), restricts maps to
  the lungs, and gives audit and baselines the outline of the lungs.
- `find_dark_lungs` is a rule for grey values, which takes any dark region inside the slice for a lung. Doubts whether a
  scan is a chest CT use it, because they must not load a model (`scan.body.find_doubts`). So does the score "energy
  inside lung" of maps on outlined slices (`lesions.LesionSlice`), whose lesion it adds.

Shapes: H rows, W columns.
"""

import functools
import math

import numpy as np
import scipy

from covidjax.data.preprocess import Box, compute_otsu_threshold, resize, resize_probabilities

_BLACK = 10  # grey value; outside the lungs, cut slices have traces of compression and resizing
_MIN_BLACK, _MAX_LIT_BORDER = 0.25, 0.3  # in a cut slice: black share of the slice, share of its border that is not
_MAX_DEPTH, _MAX_BRIGHT = 0.2, 0.33  # a body exceeds both: its depth as a share of the slice, its bright share
# Probability of lungs or of lesion. At most 1.15 times the outlined lungs of training slices pass it (docs/lesions.md).
_THRESHOLD = 0.25
_SURE = 0.5  # probability of lungs that each region has somewhere
_ROUND = (0.75, 0.95)  # share of a slice inside a round field of view; a circle in a square covers 0.79
_SKIN = 0.015  # of the longer side; a model's outline of the air reaches into it
_MIN_LUNGS = 0.01  # share of the slice
MIN_DARK_LUNGS = 0.05  # likewise, by the rule for grey values
_MAX_CONTACT = 2.3  # pixels of a dark region at the border of the slice, over the square root of its area, see `lungs`


def find_lungs_in_slice(grey_HxW: np.ndarray) -> np.ndarray | None:
    """Finds the lungs in a slice without Hounsfield units, by the lesion model of this package.

    In a slice that is already cut to the lungs, the lungs are all that is not black. In other slices, they are what the
    lesion model of this package calls lungs or lesions, without the air outside the body and with holes filled. The
    first call loads the model.

    Args:
      grey_HxW: uint8.

    Returns:
      bool [H, W], or None if they are less than a hundredth of the slice. The slice may show no lungs or no chest. Use
      it whole or leave it out, and report how many slices failed.
    """
    if is_cut_to_lungs(grey_HxW):
        return scipy.ndimage.binary_fill_holes(grey_HxW > _BLACK)
    outline, size = _load_model()
    probabilities = resize_probabilities(outline(resize(grey_HxW, size))[..., :2], grey_HxW.shape)
    found_HxW = (probabilities.max(-1) > _THRESHOLD) & ~find_outside_air(grey_HxW)
    regions, count = scipy.ndimage.label(found_HxW)
    is_lung = np.zeros(count + 1, bool)
    is_lung[regions[probabilities[..., 0] > _SURE]] = True
    is_lung[0] = False  # air outside
    lungs_HxW = scipy.ndimage.binary_fill_holes(is_lung[regions])
    return lungs_HxW if lungs_HxW.mean() >= _MIN_LUNGS else None


@functools.cache
def _load_model():
    """Returns the lesion model as a function uint8 [S, S] -> probabilities [S / 4, S / 4, 3], and S."""
    # Most slices of a dataset of cut slices need no model, and its import takes a second in every worker.
    import jax

    from covidjax.models.att2 import normalise
    from covidjax.models.fast import compile_fast
    from covidjax.models.lesion_weights import load_box

    box = load_box()
    model = box.model.clone(mirror=False)  # half the time; finds the same lungs

    @compile_fast
    def apply(variables, image_SxS):
        return jax.nn.sigmoid(model.apply(variables, normalise(image_SxS)[None, ..., None], train=False)[0])

    return lambda image_SxS: np.asarray(apply(box.folded, image_SxS)), box.image_size


def find_dark_lungs(grey_HxW: np.ndarray, lesion_HxW: np.ndarray | None = None) -> np.ndarray | None:
    """Finds the lungs by a rule, without a model: dark regions that touch no corner of the slice, with holes filled.

    Args:
      grey_HxW: uint8, cropped to the body or to the lungs.
      lesion_HxW: bool, an outlined lesion, which counts as lung; None for none.

    Returns:
      bool [H, W], or None if it covers less than 5 % of the slice, which means that the rule failed.
    """
    regions, count = scipy.ndimage.label(grey_HxW < compute_otsu_threshold(grey_HxW))
    # Air outside the body is in the corners. The lungs can touch the sides if the slice is cropped to them.
    corners = regions[[0, 0, -1, -1], [0, -1, 0, -1]]
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    kept = np.setdiff1d(np.flatnonzero(areas >= 0.005 * grey_HxW.size), [0, *corners])
    lungs = np.isin(regions, kept)
    lungs = scipy.ndimage.binary_fill_holes(lungs if lesion_HxW is None else lungs | lesion_HxW)
    return lungs if lungs.mean() >= MIN_DARK_LUNGS else None


def find_outside_air(grey_HxW: np.ndarray) -> np.ndarray:
    """Returns the air outside the body, bool [H, W], which a model may mistake for lungs.

    It is dark, and touches two corners of the slice or lies along its border; the skin around it is included. In a
    closely cropped slice, a lung touches the border with less of its outline. A slice that is cut to the lungs has no
    such air.

    Args:
      grey_HxW: uint8.
    """
    if is_cut_to_lungs(grey_HxW):
        return np.zeros(grey_HxW.shape, bool)
    # Black around a round field of view is no air: with it, the threshold would be below the air inside.
    lit = grey_HxW[grey_HxW > _BLACK]
    is_round = _ROUND[0] < lit.size / grey_HxW.size < _ROUND[1]
    regions, count = scipy.ndimage.label(grey_HxW < compute_otsu_threshold(lit if is_round else grey_HxW))
    corners = regions[[0, 0, -1, -1], [0, -1, 0, -1]]
    border = np.concatenate([regions[0], regions[-1], regions[1:-1, 0], regions[1:-1, -1]])
    contact, area = np.bincount(border, minlength=count + 1), np.bincount(regions.ravel(), minlength=count + 1)
    is_outside = (np.bincount(corners, minlength=count + 1) >= 2) | (contact > _MAX_CONTACT * np.sqrt(area))
    is_outside[0] = False
    skin = math.ceil(max(grey_HxW.shape) * _SKIN)
    return scipy.ndimage.binary_dilation(is_outside[regions], iterations=skin)


def is_cut_to_lungs(grey_HxW: np.ndarray) -> bool:
    """Returns whether a slice uint8 [H, W] shows only the lungs, on black, as in some public datasets.

    In such a slice, most of the border and much of the area are black, and the rest is less deep or less bright than a
    body.
    """
    lit = grey_HxW > _BLACK
    border = np.concatenate([lit[0], lit[-1], lit[:, 0], lit[:, -1]])
    if lit.mean() > 1 - _MIN_BLACK or border.mean() > _MAX_LIT_BORDER:
        return False
    filled = np.pad(scipy.ndimage.binary_fill_holes(scipy.ndimage.binary_opening(lit)), 1)
    depth = scipy.ndimage.distance_transform_edt(filled)[1:-1, 1:-1] / max(grey_HxW.shape)
    inner = depth > 0.01  # masks may have a bright edge of a pixel or two
    if not inner.any():
        return False
    bright = (grey_HxW[inner] > compute_otsu_threshold(grey_HxW[inner])).mean()
    return bool(depth.max() <= _MAX_DEPTH or bright <= _MAX_BRIGHT)


def cut_to_lungs(grey_HxW: np.ndarray, lungs_HxW: np.ndarray, margin: float = 0.0) -> tuple[np.ndarray, Box]:
    """Sets pixels outside the lungs to 0 and crops to the bounding box of the lungs.

    With the default margin of 0, the result has the form of public datasets of lung slices.

    Args:
      grey_HxW: [H, W] of any dtype; not changed.
      lungs_HxW: bool [H, W], with at least one True.
      margin: margin on each side, as a share of the longer side of the box; clipped to the slice.

    Returns:
      The image [h, w], 0 outside the lungs, and its box xmin, ymin, xmax, ymax in pixels, half-open.

    Raises:
      ValueError: the shapes differ, the mask is empty, or the margin is negative.
    """
    if grey_HxW.shape != lungs_HxW.shape or lungs_HxW.ndim != 2:
        raise ValueError(f'slice and lungs must have one shape [H, W], got {grey_HxW.shape} and {lungs_HxW.shape}')
    if not margin >= 0:
        raise ValueError(f'margin must not be negative, got {margin}')
    rows, columns = np.flatnonzero(lungs_HxW.any(1)), np.flatnonzero(lungs_HxW.any(0))
    if not len(rows):
        raise ValueError('no lungs in this slice: leave it out, or use it whole')
    ymin, ymax, xmin, xmax = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    reach = round(margin * max(ymax - ymin, xmax - xmin))
    height, width = grey_HxW.shape
    xmin, ymin = max(0, xmin - reach), max(0, ymin - reach)
    xmax, ymax = min(width, xmax + reach), min(height, ymax + reach)
    inner = np.s_[ymin:ymax, xmin:xmax]
    image = np.where(lungs_HxW[inner], grey_HxW[inner], 0).astype(grey_HxW.dtype)
    return image, (int(xmin), int(ymin), int(xmax), int(ymax))
