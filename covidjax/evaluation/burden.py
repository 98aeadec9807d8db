"""What a scan carries: volumes of lungs, lesions and consolidation, where they are, and which slices are infected.

Shapes: T slices from head to feet; h, w the grid of the model's outputs, which covers a whole slice; G, V rows and
columns of the cells on which everything is measured; t layers of cells of one or more slices.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.data.lungs import LungsGrid, enlarge_lungs
from covidjax.evaluation.overlap import compute_dice
from covidjax.evaluation.segmentation import CONSOLIDATION_THRESHOLD, LUNGS_THRESHOLD

INFECTED_SHARE = 0.005  # of the lungs in the slice where they are largest
INFECTED_RULE = (
    f'lesions of at least {INFECTED_SHARE:.1%} of the area of the lungs in the slice where these are largest'
)
GRADES = ('no infected slice', 'up to 25 %', 'up to 50 %', 'up to 75 %', 'above 75 %')
GRADE_RULE = 'by the share of the lungs that the model calls lesion, not by eye'
SIDES, THIRDS = ('right', 'left'), ('upper', 'middle', 'lower')

_FACTOR = 4  # cells in a cell of the model's grid, where there is no grid of the lungs
_CUT_SHARE = 0.2  # of the lungs in the slice where they are largest
_PLAUSIBLE_ML = (1000, 10_000)  # both lungs of an adult
_MIN_AGREEMENT = 0.8  # Dice
_MAX_OUTSIDE, _MAX_OUTSIDE_ML = 0.1, 10  # lesions outside the lungs: of those inside, and at least
_GAP = 0.5  # emptiest column between the lungs, as a share of the fuller columns on both sides


class Amount(NamedTuple):
    """Contents of the lungs or of a part of them.

    Attributes:
      lungs_ml, lesions_ml, consolidation_ml: volumes, lesions with consolidation; None without a spacing.
      lesions_percent, consolidation_percent: of these lungs; None if there are none.
    """

    lungs_ml: float | None
    lesions_ml: float | None
    consolidation_ml: float | None
    lesions_percent: float | None
    consolidation_percent: float | None


class SliceBurden(NamedTuple):
    """One slice.

    Attributes:
      number: from 1, at the head.
      lungs_cm2, lesions_cm2: areas; None without a spacing.
      lungs_percent: of the slice.
      lesions_percent: of the lungs in the slice; 0 without lungs.
      is_infected: see `INFECTED_RULE`.
      score: to rank slices by; mean lesion probability in the lungs, times their area, over the area of the lungs in
        the slice where these are largest. The area above the threshold, which is 0 in many slices, ranks them worse.
      peak: highest lesion probability in the lungs; 0 without lungs.
    """

    number: int
    lungs_cm2: float | None
    lesions_cm2: float | None
    lungs_percent: float
    lesions_percent: float
    is_infected: bool
    score: float
    peak: float


class Burden(NamedTuple):
    """What a scan carries.

    Attributes:
      is_from_hu: the lungs are found from Hounsfield units and enlarged by the model; otherwise they are the model's.
      threshold: of the lesion probability.
      whole: both lungs.
      sides: 'right' and 'left', of the patient.
      thirds: 'upper', 'middle' and 'lower', of the height of the lungs.
      lesions_hu: mean Hounsfield units of the lesions; None without Hounsfield units or lesions.
      slices: all slices.
      grade: index into `GRADES`; None without lungs.
      remarks: what makes the numbers less sure. They refuse no scan.
      lungs_txGxV: the lungs, bool; lesions count inside them only.
    """

    is_from_hu: bool
    threshold: float
    whole: Amount
    sides: dict[str, Amount]
    thirds: dict[str, Amount]
    lesions_hu: float | None
    slices: list[SliceBurden]
    grade: int | None
    remarks: list[str]
    lungs_txGxV: np.ndarray

    @property
    def infected(self) -> list[int]:
        """Numbers of the infected slices, from 1."""
        return [s.number for s in self.slices if s.is_infected]

    def describe_lungs(self) -> str:
        """Returns how the lungs were found."""
        if self.is_from_hu:
            return 'in 3-D from Hounsfield units, enlarged by what the model calls lungs beside them'
        return 'by the model alone'

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able dict with everything but the mask."""
        return {
            'lungs_found': self.describe_lungs(),
            'threshold': self.threshold,
            **self.whole._asdict(),
            'lesions_hu': self.lesions_hu,
            'sides': {name: amount._asdict() for name, amount in self.sides.items()},
            'thirds': {name: amount._asdict() for name, amount in self.thirds.items()},
            'grade': self.grade,
            'grade_says': None if self.grade is None else GRADES[self.grade],
            'grade_rule': GRADE_RULE,
            'num_infected': len(self.infected),
            'infected': self.infected,
            'infected_rule': INFECTED_RULE,
            'remarks': self.remarks,
            'slices': [s._asdict() for s in self.slices],
        }


def measure_burden(
    probabilities_Txhxwx3: np.ndarray,
    grid: LungsGrid | None,
    depths_mm: np.ndarray | None = None,
    *,
    threshold: float,
) -> Burden:
    """Measures what a scan carries.

    Everything is measured on the cells of the grid, about 2 mm wide, one slice at a time. Without a grid, the cells are
    a fourth of those of the model, and there are no volumes.

    Args:
      probabilities_Txhxwx3: of lungs, of lesion, and of consolidation given lesion, float, of whole slices from head to
        feet, the patient's right on the left.
      grid: lungs found from Hounsfield units; None without Hounsfield units.
      depths_mm: [T] depth of each slice below the first; by default the slices are evenly spaced.
      threshold: of the lesion probability.

    Raises:
      ValueError: the grid has another number of slices.
    """
    num_slices, height, width, _ = probabilities_Txhxwx3.shape
    if grid is not None and grid.shape[0] != num_slices:
        raise ValueError(f'probabilities of {num_slices} slices, and a grid of {grid.shape[0]}')
    steps = (1, 1, 1) if grid is None else grid.steps
    size = (height * _FACTOR, width * _FACTOR) if grid is None else grid.shape[1:]
    # Rows and columns of pixels in each cell; the last cell may be incomplete.
    tall, wide = (np.diff(np.arange(0, n, step), append=n) for n, step in zip(size, steps[1:], strict=True))
    rows, columns = _locate(tall, height), _locate(wide, width)

    def resize(part_hxw: np.ndarray) -> np.ndarray:
        return _interpolate(_interpolate(part_hxw.astype(np.float32), rows).T, columns).T

    layers_T = np.arange(num_slices) // steps[0]
    slices_t = np.bincount(layers_T)
    means_txGxVx2 = np.zeros((len(slices_t), len(tall), len(wide), 2), np.float32)
    for layer, of_slice in zip(layers_T, probabilities_Txhxwx3, strict=True):
        for i in range(2):
            means_txGxVx2[layer, ..., i] += resize(of_slice[..., i]) / slices_t[layer]
    model_txGxV, called_txGxV = means_txGxVx2[..., 0] > LUNGS_THRESHOLD, means_txGxVx2[..., 1] >= threshold
    del means_txGxVx2
    is_from_hu = grid is not None and bool(grid.lungs_txhxw.any())
    lungs_txGxV = enlarge_lungs(grid, model_txGxV, called_txGxV) if is_from_hu else model_txGxV

    # Millilitres of a pixel of each slice, or 1.
    has_mm = grid is not None
    thickness_T = np.ones(num_slices)
    if has_mm:
        thickness_T *= grid.spacing_mm[0] if depths_mm is None or num_slices == 1 else np.gradient(depths_mm)
    pixel_mm2 = math.prod(grid.spacing_mm[1:]) if has_mm else 1.0
    midline = _find_midline(slices_t @ (tall @ lungs_txGxV), wide)
    right_V = np.clip((midline - (np.cumsum(wide) - wide)) / wide, 0, 1)  # share of each column of cells

    areas_Tx3x2 = np.zeros((num_slices, 3, 2))  # of lungs, lesions and consolidation, right and left, in pixels
    expected_T, peaks_T, outside_T = np.zeros((3, num_slices))
    hu_sum, num_hu = 0.0, 0.0
    for place, (layer, of_slice) in enumerate(zip(layers_T, probabilities_Txhxwx3, strict=True)):
        lungs_GxV, lesion_GxV = lungs_txGxV[layer], resize(of_slice[..., 1])
        called_GxV = lesion_GxV >= threshold
        inside_GxV = called_GxV & lungs_GxV
        dense_GxV = inside_GxV & (resize(of_slice[..., 2]) >= CONSOLIDATION_THRESHOLD)
        for i, mask_GxV in enumerate((lungs_GxV, inside_GxV, dense_GxV)):
            columns_V = (tall @ mask_GxV) * wide
            areas_Tx3x2[place, i] = columns_V @ right_V, columns_V @ (1 - right_V)
        expected_T[place] = (tall[:, np.newaxis] * wide * lesion_GxV)[lungs_GxV].sum()
        peaks_T[place] = lesion_GxV[lungs_GxV].max(initial=0)
        outside_T[place] = (tall @ (called_GxV & ~lungs_GxV)) @ wide
        if has_mm and inside_GxV.any():
            weights = np.outer(tall, wide)[inside_GxV] * thickness_T[place]
            hu_sum += float(weights @ grid.hu_txhxw[layer][inside_GxV].astype(np.float64))
            num_hu += float(weights.sum())

    volumes_Tx3x2 = areas_Tx3x2 * (thickness_T * pixel_mm2 / 1000)[:, np.newaxis, np.newaxis]
    whole = _create_amount(volumes_Tx3x2.sum((0, 2)), has_mm)
    areas_Tx3 = areas_Tx3x2.sum(2)
    depths_T = np.cumsum(thickness_T) - thickness_T / 2
    thirds_T = _split_height(depths_T, thickness_T, areas_Tx3[:, 0] > 0)
    slices = _describe_slices(areas_Tx3, expected_T, peaks_T, size, pixel_mm2 if has_mm else None)
    grade = None
    if whole.lesions_percent is not None:
        # Rounding errors must not push 25 % into the next grade.
        reached = sum(round(whole.lesions_percent, 6) > limit for limit in (25, 50, 75))
        grade = 1 + reached if any(s.is_infected for s in slices) else 0
    agreement = compute_dice(grid.lungs_txhxw, model_txGxV) if is_from_hu else None
    outside_ml = float((outside_T * thickness_T).sum() * pixel_mm2 / 1000)
    return Burden(
        is_from_hu,
        threshold,
        whole,
        {side: _create_amount(volumes_Tx3x2[..., i].sum(0), has_mm) for i, side in enumerate(SIDES)},
        {third: _create_amount(volumes_Tx3x2[thirds_T == i].sum((0, 2)), has_mm) for i, third in enumerate(THIRDS)},
        hu_sum / num_hu if num_hu else None,
        slices,
        grade,
        _list_remarks(grid, whole, areas_Tx3, volumes_Tx3x2[:, 1].sum(), outside_ml, agreement),
        lungs_txGxV,
    )


def _locate(pixels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Locates cells between the centres of `count` equal parts of an axis, for `_interpolate`.

    Args:
      pixels: width of each cell along the axis.
      count: parts of the axis.

    Returns:
      The part before the centre of each cell, and the weight of the next one.
    """
    centres = (np.cumsum(pixels) - pixels / 2) * (count / pixels.sum()) - 0.5
    before = np.floor(centres.clip(0, count - 1)).astype(int).clip(0, max(count - 2, 0))
    return before, (centres - before).clip(0, 1).astype(np.float32)


def _interpolate(values: np.ndarray, located: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Interpolates the rows of a matrix linearly. (A product of matrices starts threads, which wait for busy cores.)"""
    before, weights = located
    weights = weights[:, np.newaxis]
    return values[before] * (1 - weights) + values[(before + 1).clip(max=len(values) - 1)] * weights


def _find_midline(areas_V: np.ndarray, wide: np.ndarray) -> float:
    """Returns the column of pixels between right and left lung: the emptiest in the middle third of the lungs.

    If it is not much emptier than the columns on both sides, there is one lung only: then the middle of the slice.

    Args:
      areas_V: lungs in each column of cells.
      wide: pixels across each column of cells.
    """
    found, ends = np.flatnonzero(areas_V), np.cumsum(wide)
    middle = ends[-1] / 2
    if len(found) < 3:
        return middle
    third = (found[-1] + 1 - found[0]) // 3
    start, stop = found[0] + third, found[-1] + 1 - third
    between = areas_V[start:stop]
    emptiest = np.flatnonzero(between == between.min()) + start
    if between.min() > _GAP * min(areas_V[:start].max(), areas_V[stop:].max()):
        return middle
    column = emptiest[len(emptiest) // 2]
    return float(ends[column] - wide[column] / 2)


def _split_height(depths_T: np.ndarray, thickness_T: np.ndarray, has_lungs_T: np.ndarray) -> np.ndarray:
    """Returns the third of the height of the lungs in which each slice has its middle: 0 upper to 2 lower, -1 none."""
    thirds_T = np.full(len(depths_T), -1)
    found = np.flatnonzero(has_lungs_T)
    if len(found):
        top = depths_T[found[0]] - thickness_T[found[0]] / 2
        bottom = depths_T[found[-1]] + thickness_T[found[-1]] / 2
        inner = np.s_[found[0] : found[-1] + 1]
        thirds_T[inner] = ((depths_T[inner] - top) / (bottom - top) * 3).astype(int).clip(0, 2)
    return thirds_T


def _create_amount(volumes_3: Sequence[float], has_mm: bool) -> Amount:
    lungs, lesions, consolidation = map(float, volumes_3)
    volumes = (lungs, lesions, consolidation) if has_mm else (None, None, None)
    shares = (100 * lesions / lungs, 100 * consolidation / lungs) if lungs else (None, None)
    return Amount(*volumes, *shares)


def _describe_slices(
    areas_Tx3: np.ndarray,
    expected_T: np.ndarray,
    peaks_T: np.ndarray,
    size: tuple[int, int],
    pixel_mm2: float | None,
) -> list[SliceBurden]:
    largest = areas_Tx3[:, 0].max()
    return [
        SliceBurden(
            place + 1,
            None if pixel_mm2 is None else lungs * pixel_mm2 / 100,
            None if pixel_mm2 is None else lesions * pixel_mm2 / 100,
            100 * lungs / math.prod(size),
            100 * lesions / lungs if lungs else 0.0,
            bool(lesions and lesions >= INFECTED_SHARE * largest),
            expected / largest if largest else 0.0,
            peak,
        )
        for place, ((lungs, lesions, _), expected, peak) in enumerate(
            zip(areas_Tx3.tolist(), expected_T.tolist(), peaks_T.tolist(), strict=True)
        )
    ]


def _list_remarks(
    grid: LungsGrid | None,
    whole: Amount,
    areas_Tx3: np.ndarray,
    inside_ml: float,
    outside_ml: float,
    agreement: float | None,
) -> list[str]:
    """Returns remarks in the order in which a reader needs them; see `Burden`."""
    remarks = []
    lungs_T = areas_Tx3[:, 0]
    if not lungs_T.any():
        return ['no lungs found: nothing is measured']
    if grid is None:
        remarks.append('no Hounsfield units: the lungs are what the model calls lungs, and there are no volumes')
    elif agreement is None:
        remarks.append('no lungs found from Hounsfield units: the lungs are what the model calls lungs')
    elif agreement < _MIN_AGREEMENT:
        remarks.append(
            f'the model and Hounsfield units disagree on the lungs (Dice {agreement:.2f}): look at the outlines'
        )
    ends = [name for name, place in (('first', 0), ('last', -1)) if lungs_T[place] > _CUT_SHARE * lungs_T.max()]
    if ends and len(lungs_T) > 1:
        remarks.append(f'the lungs are cut off at the {" and the ".join(ends)} slice: part of them is not measured')
    if whole.lungs_ml is not None and not _PLAUSIBLE_ML[0] <= whole.lungs_ml <= _PLAUSIBLE_ML[1]:
        remarks.append(f'lungs of {whole.lungs_ml:,.0f} ml are implausible for an adult: check spacing and outlines')
    if outside_ml > _MAX_OUTSIDE * inside_ml and (grid is None or outside_ml > _MAX_OUTSIDE_ML):
        amount = f'{outside_ml:,.0f} ml' if grid is not None else f'{outside_ml / (inside_ml + outside_ml):.0%}'
        remarks.append(f'{amount} of what the model calls lesions lies outside the lungs and is not counted')
    return remarks
