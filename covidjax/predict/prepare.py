"""Prepares the slices of one scan for a model. Workers import this module; it needs no jax."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from covidjax.data import sequences
from covidjax.data.preprocess import FURTHER_WINDOWS_HU, Box, apply_window, crop_grey_resize, resize
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
      hu_step: every `hu_step`-th slice is also prepared through further windows, where there are Hounsfield units; 0:
        none.
    """

    image_size: int
    region: str
    min_slices: int
    is_thinned: bool
    outline_size: int = 0
    hu_step: int = 0

    @property
    def with_lungs(self) -> bool:
        """Whether the lungs are wanted where there are Hounsfield units."""
        return self.region == 'lungs' or self.outline_size > 0


def plan_recipe(data: Mapping[str, Any], *, is_scan_run: bool, outline_size: int, windows: int) -> Recipe:
    """Returns how scans are prepared for a run.

    Args:
      data: section `data` of the run's config.
      is_scan_run: a sequence model classifies whole scans.
      outline_size: see `Recipe`.
      windows: 3 also looks at slices through two further windows, where there are Hounsfield units: at every second
        one, or at those that a scan run selects. 1 does not.
    """
    min_slices = data['min_slices'] if is_scan_run else 1
    hu_step = 0 if windows == 1 else 1 if is_scan_run and min_slices == sequences.NUM_SLICES else 2
    return Recipe(data['image_size'], data.get('region', 'body'), min_slices, is_scan_run, outline_size, hu_step)


class Views(NamedTuple):
    """Some slices of a scan through further windows.

    Attributes:
      windows_hu: lower and upper end of each window, W of them.
      positions: of these slices in `PreparedScan.used`, int [M].
      images: uint8 [W, M, S, S].
      step: every `step`-th slice of the scan is in `whole`.
      whole: whole slices, for the model of lesions, uint8 [W, T / step, s, s]; None without one.
    """

    windows_hu: tuple[tuple[int, int], ...]
    positions: np.ndarray
    images: np.ndarray
    step: int
    whole: np.ndarray | None


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
      views: the scan through further windows; None if it is not wanted, or without Hounsfield units.
    """

    volume: Volume
    boxes: list[Box]
    used: np.ndarray
    images: np.ndarray
    notes: list[str]
    doubts: list[str]
    whole: np.ndarray | None = None
    views: Views | None = None

    @property
    def num_images(self) -> int:
        """How many images `stack_images` returns."""
        return len(self.images) + (0 if self.views is None else self.views.images[..., 0, 0].size)


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
    shown, masks = list(range(count)), None
    if recipe.region == 'lungs':
        masks = find_lungs(volume)
        shown = sorted(masks)
        for place, mask in masks.items():
            grey, boxes[place] = cut_to_lungs(volume.slices[place], mask)
            prepared[place] = resize(grey, size)
        if len(shown) < recipe.min_slices:
            raise UserError(f'lungs in {len(shown)} slices, and this model needs {recipe.min_slices}')
    whole = sequences.Scan('', '', 0, tuple(shown), tuple(shown))
    used = np.array(sequences.thin_scans([whole], recipe.min_slices)[0].records if recipe.is_thinned else shown)
    return PreparedScan(
        volume._replace(
            slices=[volume.slices[count // 2]], lungs=volume.lungs if recipe.outline_size else None, planes_hu=None
        ),
        boxes,
        used,
        np.stack([prepared[place] for place in used]),
        note_lungs(volume, shown, recipe.region),
        doubts,
        np.stack([resize(grey, recipe.outline_size) for grey in volume.slices]) if recipe.outline_size else None,
        create_views(volume.planes_hu, recipe, boxes, masks, used) if volume.planes_hu else None,
    )


def create_views(
    planes_hu: dict[int, np.ndarray],
    recipe: Recipe,
    boxes: Sequence[Box],
    masks: dict[int, np.ndarray] | None,
    used: np.ndarray,
) -> Views | None:
    """Prepares slices through `FURTHER_WINDOWS_HU` as the others; None if the model sees none of them.

    Args:
      planes_hu: see `Volume`.
      recipe: what the run asks for.
      boxes: crop boxes of all slices.
      masks: the lungs of the slices to cut to them; None for whole bodies.
      used: see `PreparedScan`.
    """
    positions = np.array([i for i, place in enumerate(used.tolist()) if place in planes_hu], int)
    if not len(positions):
        return None
    images, whole = [], []
    for window in FURTHER_WINDOWS_HU:
        for place in used[positions].tolist():
            grey = apply_window(planes_hu[place], window)
            cut = grey if masks is None else cut_to_lungs(grey, masks[place])[0]
            images.append(
                prepare_slice(cut, boxes[place], recipe.image_size) if masks is None else resize(cut, recipe.image_size)
            )
        if recipe.outline_size:
            whole += [resize(apply_window(planes_hu[p], window), recipe.outline_size) for p in sorted(planes_hu)]

    def stack(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts).reshape(len(FURTHER_WINDOWS_HU), -1, *parts[0].shape)

    return Views(FURTHER_WINDOWS_HU, positions, stack(images), recipe.hu_step, stack(whole) if whole else None)


def stack_images(prepared: PreparedScan) -> np.ndarray:
    """Returns all that a slice model looks at, uint8 [N + W M, S, S, 1]: `images`, then those of each view."""
    images = prepared.images
    if prepared.views is not None:
        images = np.concatenate([images, *prepared.views.images])
    return images[..., np.newaxis]


def find_lungs(volume: Volume) -> dict[int, np.ndarray]:
    """Finds the lungs in the slices of a scan.

    Slices at the ends of the lungs show little: those with less than a tenth of the lungs of the fullest are left out.

    Returns:
      Masks bool [H, W] by number of the slice (from 0).
    """
    if volume.lungs is None:
        masks = [find_lungs_in_slice(grey) for grey in volume.slices]
    else:
        steps, layers = volume.lungs.steps[0], list(map(volume.lungs.enlarge, volume.lungs.lungs_txhxw))
        masks = [layers[place // steps] for place in range(len(volume.slices))]
    areas = np.array([0.0 if mask is None else mask.mean() for mask in masks])
    kept = np.flatnonzero((areas > 0) & (areas >= MIN_LUNGS_SHARE * areas.max(initial=0)))
    return {int(place): masks[place] for place in kept}


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
