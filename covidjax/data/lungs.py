"""Finds the lungs of a scan in 3-D from Hounsfield units.

Shapes: T slices, H rows (front to back or the other way), W columns (from one side of the patient to the other).
Lower-case t, h, w are the same axes on a coarse grid.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy
from PIL import Image

_AIR_HU = -320  # between lung, about -850, and soft tissue, about 40
_GAS_HU = -960  # the median of lung is above; that of gas in the bowel and around the body is below
_AIRWAY_HU = -900  # airways are narrow, so partial volume of their walls raises the density of their gas
_PADDING_HU = -1015  # padding outside the field of view is at or below this value, after clipping
_MIN_HU = -1024
_GRID_MM = 2.0
_CLOSING_MM = 20.0  # radius
_MAX_AIRWAY_MM2 = 1000.0  # in one slice
_AIRWAY_REACH_MM = 50.0  # from the middle of the body
_MIN_SLICE_MM2 = 400.0  # smallest area of the lungs in the slice where they are largest
_MIN_SIDES = 2.6  # number of sides with body, of four, averaged over a region
_MIN_SIDES_CUT = 1.5  # the same for a region cut by the field of view; the table has the body on one side
_MAX_CONTACT = 2.3  # pixels of a region at the edge of the field of view, over the square root of its area
_MIN_PART = 0.05  # size of a part, as a share of the largest
_MIN_HALF = 0.2  # share of a part on each side of the body, if it holds both lungs
_THIN_STACK_MM = 40.0  # in a thinner stack, a lung may have several parts
_REACH_MM = 40.0  # how far a model may enlarge the lungs in a slice
_RIM_MM = 5.0  # radius; thinner additions are differences of two outlines, unless they are lesions

_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


def find_lungs_in_scan(hu_TxHxW: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Finds the lungs in 3-D: the two largest regions of air inside the body, closed to include lesions.

    Airways and bowel gas are excluded by density, size and position. Each lung is closed on its own, by a disc of 20 mm
    radius in each slice. This includes vessels and most of a dense lesion at the chest wall that is up to 30 mm wide,
    and excludes the mediastinum. The computation uses a grid of about 2 mm. A scan of 512 x 512 x 150 voxels needs
    about 180 MB in addition to the input and the result.

    Args:
      hu_TxHxW: Hounsfield units of any integer or floating type, slices in anatomical order, either end first; not
        changed.
      spacing_mm: distance between slices, rows and columns. If slices are missing, pass the median slice distance.

    Returns:
      bool [T, H, W], all False if no lungs are found.

    Raises:
      ValueError: the scan does not have three axes, an axis is empty, or the spacing is not positive.
    """
    if hu_TxHxW.ndim != 3:
        raise ValueError(f'a scan has the shape [T, H, W], got {hu_TxHxW.shape}')
    finder = LungsFinder(hu_TxHxW.shape, spacing_mm)
    for hu_HxW in hu_TxHxW:
        finder.add(hu_HxW)
    grid = finder.find()
    lungs_TxHxW = np.zeros(hu_TxHxW.shape, bool)
    for place, lungs_hxw in enumerate(grid.lungs_txhxw):
        if lungs_hxw.any():
            start = place * grid.steps[0]
            lungs_TxHxW[start : start + grid.steps[0]] = grid.enlarge(lungs_hxw)
    return lungs_TxHxW


class LungsGrid(NamedTuple):
    """Lungs of a scan on a grid of about 2 mm. A cell is a block of voxels; the last of an axis may be incomplete.

    Attributes:
      hu_txhxw: mean Hounsfield units of the cells, float16.
      lungs_txhxw: bool, all False if no lungs are found.
      steps: slices, rows and columns in a cell.
      spacing_mm: distance between slices, rows and columns.
      shape: T, H, W.
    """

    hu_txhxw: np.ndarray
    lungs_txhxw: np.ndarray
    steps: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]

    @property
    def cell_mm(self) -> tuple[float, float, float]:
        """Size of a cell: slices, rows, columns."""
        return tuple(step * mm for step, mm in zip(self.steps, self.spacing_mm, strict=True))

    def enlarge(self, mask_hxw: np.ndarray) -> np.ndarray:
        """Resizes a mask of one layer of cells to the pixels of a slice, bool [H, W], with smooth edges."""
        if self.steps[1:] == (1, 1):
            return mask_hxw
        (height, width), (tall, wide) = self.shape[1:], self.steps[1:]
        # The last block may be incomplete: the grid extends past the image.
        image = Image.fromarray(mask_hxw.astype(np.uint8) * 255)
        box = (0, 0, width / wide, height / tall)
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box)) >= 128


class LungsFinder:
    """`find_lungs_in_scan` for slices that come one by one and are not kept.

    Args:
      shape: T, H, W.
      spacing_mm: see `find_lungs_in_scan`.
    """

    def __init__(self, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]):
        if len(shape) != 3 or 0 in shape:
            raise ValueError(f'a scan has the shape [T, H, W], got {shape}')
        if len(spacing_mm) != 3 or not all(0 < step < math.inf for step in spacing_mm):
            raise ValueError(f'spacing must be three positive lengths in mm, got {spacing_mm}')
        pairs = zip(spacing_mm, shape, strict=True)
        self._shape, self._spacing_mm, self._count = tuple(shape), tuple(map(float, spacing_mm)), 0
        self._steps = tuple(max(1, min(round(_GRID_MM / mm), size // 16)) for mm, size in pairs)
        self._starts = [np.arange(0, size, step) for size, step in zip(shape, self._steps, strict=True)]
        self._sums_txhxw = np.zeros([len(place) for place in self._starts], np.float32)

    def add(self, hu_HxW: np.ndarray) -> None:
        """Adds the next slice to the sums of blocks."""
        rows_hxW = np.add.reduceat(np.maximum(hu_HxW.astype(np.float32), _MIN_HU), self._starts[1], axis=0)
        self._sums_txhxw[self._count // self._steps[0]] += np.add.reduceat(rows_hxW, self._starts[2], axis=1)
        self._count += 1

    def find(self) -> LungsGrid:
        """Returns the lungs in the slices that were added, T in all."""
        hu_txhxw = self._average()
        cell_mm = np.multiply(self._steps, self._spacing_mm)
        lungs_txhxw = _find_on_grid(hu_txhxw, cell_mm)
        return LungsGrid(hu_txhxw.astype(np.float16), lungs_txhxw, self._steps, self._spacing_mm, self._shape)

    def _average(self) -> np.ndarray:
        """Returns means float32 [t, h, w] of blocks, which also removes noise."""
        thick, tall, wide = (
            np.diff(place, append=size).astype(np.float32)
            for size, place in zip(self._shape, self._starts, strict=True)
        )
        means_txhxw = self._sums_txhxw / thick[:, np.newaxis, np.newaxis]
        means_txhxw /= np.outer(tall, wide)
        return means_txhxw


def _find_on_grid(hu_txhxw: np.ndarray, grid_mm: np.ndarray) -> np.ndarray:
    """Returns the lungs, bool [t, h, w]."""
    closed_txhxw = np.zeros(hu_txhxw.shape, bool)
    body_txhxw = _find_body(hu_txhxw >= _AIR_HU)
    if not body_txhxw.any():
        return closed_txhxw
    candidates_txhxw, airways_txhxw = _find_candidates(hu_txhxw, body_txhxw, grid_mm)
    sides_txhxw = _choose_lungs(hu_txhxw, candidates_txhxw, body_txhxw, grid_mm)
    largest = (sides_txhxw > 0).sum((1, 2)).max() * grid_mm[1] * grid_mm[2]
    if largest < _MIN_SLICE_MM2:
        return closed_txhxw
    for place, sides_hxw in enumerate(sides_txhxw):
        if sides_hxw.any():
            closed_txhxw[place] = _close_each(sides_hxw, _CLOSING_MM, tuple(grid_mm[1:]))
    closed_txhxw = _fill_holes(closed_txhxw)
    closed_txhxw &= ~(scipy.ndimage.binary_dilation(airways_txhxw, _IN_PLANE) & (sides_txhxw == 0))
    return closed_txhxw


def enlarge_lungs(grid: LungsGrid, model_txhxw: np.ndarray, lesions_txhxw: np.ndarray) -> np.ndarray:
    """Adds to the lungs of a grid what a model calls lungs beside them: dense lesions at the chest wall.

    An addition is dense, and in its slice connected to the lungs and within 40 mm of them. Therefore gas of the bowel,
    the table, the shoulders above the lungs and the organs below them stay outside; so does a lung that has no air in
    the slice. Additions that are less than 10 mm thick count only where the model sees lesions: elsewhere they are the
    difference of two outlines.

    Args:
      grid: of the scan, with lungs.
      model_txhxw: what the model calls lungs, bool on the cells of the grid.
      lesions_txhxw: what the model calls lesions, likewise.

    Returns:
      The enlarged lungs, bool [t, h, w].
    """
    lungs_txhxw = grid.lungs_txhxw
    added_txhxw = model_txhxw & ~lungs_txhxw & (grid.hu_txhxw >= _AIR_HU)
    added_txhxw &= _open(added_txhxw, _RIM_MM, grid.cell_mm[1:]) | lesions_txhxw
    for lungs_hxw, added_hxw in zip(lungs_txhxw, added_txhxw, strict=True):
        if added_hxw.any():
            if lungs_hxw.any():
                added_hxw &= scipy.ndimage.distance_transform_edt(~lungs_hxw, grid.cell_mm[1:]) <= _REACH_MM
            else:
                added_hxw[:] = False
    if not added_txhxw.any():
        return lungs_txhxw
    regions, count = scipy.ndimage.label(added_txhxw | lungs_txhxw, _IN_PLANE)
    is_connected = np.zeros(count + 1, bool)
    is_connected[regions[lungs_txhxw]] = True
    result_txhxw = lungs_txhxw | (added_txhxw & is_connected[regions])
    # What an addition encloses, such as an air bronchogram, but not the airways that the lungs alone enclose.
    return result_txhxw | (_fill_holes(result_txhxw) & ~_fill_holes(lungs_txhxw))


def _open(mask_txhxw: np.ndarray, radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Opens each layer of a mask by a disc, whose radius has the unit of the spacing."""
    opened_txhxw = np.zeros_like(mask_txhxw)
    for place, mask_hxw in enumerate(mask_txhxw):
        if mask_hxw.any():
            core = scipy.ndimage.distance_transform_edt(np.pad(mask_hxw, 1), spacing) > radius
            if core.any():
                opened = scipy.ndimage.distance_transform_edt(~core, spacing) <= radius
                opened_txhxw[place] = opened[1:-1, 1:-1]
    return opened_txhxw


def _fill_holes(mask_txhxw: np.ndarray) -> np.ndarray:
    """Fills 3-D holes of a mask: an enclosed lesion, but not the top of the liver, which continues below."""
    regions, count = scipy.ndimage.label(~mask_txhxw)
    is_open = np.zeros(count + 1, bool)
    for axis in range(3):
        is_open[np.take(regions, [0, -1], axis)] = True
    return mask_txhxw | ~is_open[regions]


def _find_body(tissue_txhxw: np.ndarray) -> np.ndarray:
    """Returns the largest region of tissue, bool [t, h, w]; excludes the table, and sometimes the arms."""
    # Half the resolution is enough for `_count_sides`.
    half = tissue_txhxw[:, ::2, ::2]
    regions, count = scipy.ndimage.label(scipy.ndimage.binary_opening(half, _IN_PLANE))
    if not count:
        return np.zeros(tissue_txhxw.shape, bool)
    body = regions == 1 + np.bincount(regions.ravel())[1:].argmax()
    return body.repeat(2, 1).repeat(2, 2)[:, : tissue_txhxw.shape[1], : tissue_txhxw.shape[2]]


def _count_sides(body: np.ndarray) -> np.ndarray:
    """Returns uint8 [..., H, W]: the number of sides (front, back, left, right) on which the body lies."""
    count = np.zeros(body.shape, np.uint8)
    for axis in (-2, -1):
        count += np.logical_or.accumulate(body, axis)
        count += np.flip(np.logical_or.accumulate(np.flip(body, axis), axis), axis)
    return count


def _find_candidates(
    hu_txhxw: np.ndarray, body_txhxw: np.ndarray, grid_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the regions of air in each slice that may be lung, and those that are airways, both bool [t, h, w]."""
    padding = _touching_corners(hu_txhxw <= _PADDING_HU)
    air = (hu_txhxw < _AIR_HU) & ~padding
    regions, count = scipy.ndimage.label(air, _IN_PLANE)
    edge = scipy.ndimage.binary_dilation(padding, _IN_PLANE)
    edge[:, [0, -1]] = edge[:, :, [0, -1]] = True
    labels, values = regions[air], hu_txhxw[air]

    def total(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(labels, weights, count + 1)

    with np.errstate(invalid='ignore'):  # label 0 has no pixels
        area = total()
        sides = total(_count_sides(body_txhxw)[air]) / area
        is_gas = total(values < _GAS_HU) > area / 2  # the median
        is_dark = total(values < _AIRWAY_HU) > area / 2
        columns = total(np.nonzero(air)[2]) / area
        # Lungs may touch the edge of the field of view. Air outside the body is gas, or lies along the edge.
        contact = total(edge[air])
        is_outside = (contact > 0) & (is_gas | (contact > _MAX_CONTACT * np.sqrt(area)))
        is_outside[0] = False
        # Where a lung touches the edge, the body continues beyond it.
        walls = total(_count_sides(body_txhxw | (edge & ~is_outside[regions]))[air]) / area
    middle = np.nonzero(body_txhxw)[2].mean()
    is_airway = (
        is_dark
        & (area * grid_mm[1] * grid_mm[2] < _MAX_AIRWAY_MM2)
        & (abs(columns - middle) * grid_mm[2] < _AIRWAY_REACH_MM)
    )
    is_cut = (contact > 0) & (walls >= _MIN_SIDES) & (sides >= _MIN_SIDES_CUT)
    is_inside = ~is_outside & ((sides >= _MIN_SIDES) | is_cut)
    is_inside[0] = is_airway[0] = False
    return (is_inside & ~is_airway)[regions], (is_inside & is_airway)[regions]


def _touching_corners(mask_txhxw: np.ndarray) -> np.ndarray:
    """Returns the regions of a mask that contain a corner of their slice, bool [t, h, w]."""
    regions, _ = scipy.ndimage.label(mask_txhxw, _IN_PLANE)
    corners = np.unique(regions[:, [0, 0, -1, -1], [0, -1, 0, -1]])
    is_corner = np.zeros(regions.max() + 1, bool)
    is_corner[corners] = True
    is_corner[0] = False
    return is_corner[regions]


def _choose_lungs(
    hu_txhxw: np.ndarray, candidates_txhxw: np.ndarray, body_txhxw: np.ndarray, grid_mm: np.ndarray
) -> np.ndarray:
    """Returns uint8 [t, h, w]: 0 outside the lungs, else the number of a part that is closed on its own."""
    parts, count = scipy.ndimage.label(candidates_txhxw)
    sides_txhxw = np.zeros(parts.shape, np.uint8)
    if not count:
        return sides_txhxw
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    is_gas = np.bincount(parts[hu_txhxw < _GAS_HU], minlength=count + 1) > sizes / 2
    sizes[is_gas] = 0
    order = np.argsort(-sizes, kind='stable')
    if not sizes[order[0]]:
        return sides_txhxw
    order = order[sizes[order] >= _MIN_PART * sizes[order[0]]]
    middle = np.nonzero(body_txhxw)[2].mean()
    is_left = np.nonzero(parts == order[0])[2] < middle
    is_both = min(is_left.mean(), 1 - is_left.mean()) >= _MIN_HALF
    if len(hu_txhxw) * grid_mm[0] >= _THIN_STACK_MM:
        order = order[: 1 if is_both else 2]
    for number, part in enumerate(order[:200].tolist(), start=1):
        sides_txhxw[parts == part] = number
    if is_both:
        for sides_hxw in sides_txhxw:
            _part_lungs(sides_hxw)
    return sides_txhxw


def _part_lungs(parts_HxW: np.ndarray) -> None:
    """Splits part 1, which holds both lungs, at the emptiest column of its middle third; the right half gets 255."""
    lungs = parts_HxW == 1
    counts = lungs.sum(0)
    found = np.flatnonzero(counts)
    if len(found) < 3:
        return
    third = (found[-1] + 1 - found[0]) // 3
    middle = counts[found[0] + third : found[-1] + 1 - third]
    emptiest = np.flatnonzero(middle == middle.min())
    cut = found[0] + third + emptiest[len(emptiest) // 2]
    parts_HxW[:, cut:][lungs[:, cut:]] = 255


def _close_each(parts_HxW: np.ndarray, radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Returns bool [H, W]: each part closed by a disc, whose radius has the unit of the spacing."""
    closed_HxW = np.zeros(parts_HxW.shape, bool)
    reach = [math.ceil(radius / step) + 2 for step in spacing]
    for number in np.unique(parts_HxW[parts_HxW > 0]):
        part_HxW = parts_HxW == number
        box = scipy.ndimage.find_objects(part_HxW.astype(np.uint8))[0]
        padded = np.pad(part_HxW[box], [(n, n) for n in reach])
        wide = scipy.ndimage.distance_transform_edt(~padded, spacing) <= radius
        narrow = scipy.ndimage.distance_transform_edt(wide, spacing) > radius
        closed_HxW[box] |= (narrow | padded)[tuple(slice(n, -n) for n in reach)]
    return closed_HxW
