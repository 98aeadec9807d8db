"""Prepares the slices of one scan for a model. Workers import this module; it needs no jax."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from covidjax.data import sequences
from covidjax.data.preprocess import Box, crop_grey_resize, resize
from covidjax.data.scan.body import find_body_box, find_doubts
from covidjax.data.scan.volume import Volume
from covidjax.data.slice_lungs import cut_to_lungs, find_lungs_in_slice
from covidjax.errors import UserError

MIN_LUNGS_SHARE = 0.1  # of the largest lungs of a scan


class Recipe(NamedTuple):
    """How scans are prepared for a run.

    Attributes:
      image_size: side of a prepared slice in pixels.
      region: 'body' or 'lungs'.
      min_slices: the fewest slices of a scan.
      is_thinned: the model sees the slices that `sequences.thin_scans` selects, not all.
      outline_size: side of the whole slices for the model of lesions; 0: there is none.
    """

    image_size: int
    region: str
    min_slices: int
    is_thinned: bool
    outline_size: int = 0

    @property
    def with_lungs(self) -> bool:
        """Whether the lungs are wanted where there are Hounsfield units."""
        return self.region == 'lungs' or self.outline_size > 0


class PreparedScan(NamedTuple):
    """A scan as a model sees it.

    Attributes:
      volume: the scan, of its slices only the middle one.
      boxes: crop boxes of all slices.
      used: indices of the prepared slices in the scan, from 0, int [N].
      images: these slices, uint8 [N, S, S].
      notes: what was left out.
      doubts: reasons not to use the scan; without force there are none.
      whole: all slices, whole, for the model of lesions, uint8 [T, s, s]; None without one.
    """

    volume: Volume
    boxes: list[Box]
    used: np.ndarray
    images: np.ndarray
    notes: list[str]
    doubts: list[str]
    whole: np.ndarray | None = None


def prepare_scan(volume: Volume, recipe: Recipe, *, force: bool) -> PreparedScan:
    """Prepares the slices of a scan as for training.

    Args:
      volume: the scan.
      recipe: what the run asks for.
      force: goes on in spite of doubts.

    Raises:
      UserError: too few slices, or doubts.
    """
    count, size = len(volume.slices), recipe.image_size
    if count < recipe.min_slices:
        raise UserError(
            f'{count} slices, and this model needs {recipe.min_slices}: pass a whole scan, or use a slice run'
        )
    boxes = [find_body_box(grey) for grey in volume.slices]
    prepared = [prepare_slice(grey, box, size) for grey, box in zip(volume.slices, boxes, strict=True)]
    doubts = volume.doubts + find_doubts(prepared)
    if doubts and not force:
        raise UserError(f'{"; ".join(doubts)} (--force goes on, and says so on the report)')
    shown = list(range(count))
    if recipe.region == 'lungs':
        cut = cut_all_to_lungs(volume)
        shown = sorted(cut)
        for place, (grey, box) in cut.items():
            prepared[place], boxes[place] = resize(grey, size), box
        if len(shown) < recipe.min_slices:
            raise UserError(f'lungs in {len(shown)} slices, and this model needs {recipe.min_slices}')
    whole = sequences.Scan('', '', 0, tuple(shown), tuple(shown))
    used = np.array(sequences.thin_scans([whole], recipe.min_slices)[0].records if recipe.is_thinned else shown)
    return PreparedScan(
        volume._replace(slices=[volume.slices[count // 2]], lungs=volume.lungs if recipe.outline_size else None),
        boxes,
        used,
        np.stack([prepared[place] for place in used]),
        note_lungs(volume, shown, recipe.region),
        doubts,
        np.stack([resize(grey, recipe.outline_size) for grey in volume.slices]) if recipe.outline_size else None,
    )


def cut_all_to_lungs(volume: Volume) -> dict[int, tuple[np.ndarray, Box]]:
    """Cuts the slices of a scan to the lungs.

    Slices at the ends of the lungs show little: those with less than a tenth of the lungs of the fullest are left out.

    Returns:
      Grey values uint8 [h, w] and their box by number of the slice (from 0).
    """
    if volume.lungs is None:
        masks = [find_lungs_in_slice(grey) for grey in volume.slices]
    else:
        steps, layers = volume.lungs.steps[0], list(map(volume.lungs.enlarge, volume.lungs.lungs_txhxw))
        masks = [layers[place // steps] for place in range(len(volume.slices))]
    areas = np.array([0.0 if mask is None else mask.mean() for mask in masks])
    kept = np.flatnonzero((areas > 0) & (areas >= MIN_LUNGS_SHARE * areas.max(initial=0)))
    return {int(place): cut_to_lungs(volume.slices[place], masks[place]) for place in kept}


def note_lungs(volume: Volume, shown: Sequence[int], region: str) -> list[str]:
    """Returns how the lungs were found and how many slices were left out for want of them."""
    if region == 'body':
        return []
    how = (
        'by the lesion model of this package, as there are no Hounsfield units'
        if volume.lungs is None
        else 'in 3-D, from Hounsfield units'
    )
    return [f'lungs found {how}; {len(volume.slices) - len(shown)} slices with few or none were left out']


def prepare_slice(grey: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Returns uint8 [size, size] of a slice uint8 [H, W]: what `covidx_ct` prepares of an image file with this box."""
    return crop_grey_resize(Image.fromarray(grey), box, size)
