"""Slices whose lesions somebody outlined: to score what a model attends to, never to train on.

Two sources: phantoms, which come with exact masks, and a folder in the form that `read_lesion_folder` tells.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from PIL import Image

from covidjax.data import phantom, preprocess
from covidjax.data.lists import CLASSES, Row
from covidjax.errors import UserError, join_faults

LIST_NAME = 'slices.csv'
_DEFAULT_CLASS = 'covid19'
MIN_LUNG = 0.05  # share of the image


class LesionSlice(NamedTuple):
    """One slice with its lesion.

    Attributes:
      name: of the image.
      patient: id; slices without one count as a patient each.
      label: class.
      image: uint8 [S, S, 1], as the networks see it.
      lesion: bool [S, S], True somewhere.
      lung: bool [S, S], lesion included, or None where `find_lung` finds none.
    """

    name: str
    patient: str
    label: int
    image: np.ndarray
    lesion: np.ndarray
    lung: np.ndarray | None


def read_lesion_folder(folder: Path, size: int) -> list[LesionSlice]:
    """Reads a folder of slices with masks, listed in `slices.csv`.

    The list has the columns `image` and `lesion`, paths relative to the folder of a slice and of its mask, two images
    of one size; what is not 0 in the mask is lesion. Optional columns are `patient` and `class` (one of `CLASSES`, by
    default covid19); others are ignored. Slices are taken whole: crop them to the body first. Slices whose mask is
    empty are left out.

    Args:
      folder: of the list.
      size: side of the slices for the networks, pixels.

    Raises:
      UserError: no list, a column is missing, or slices that can't be read: all counted, the first 20 named.
    """
    path = folder / LIST_NAME
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): --lesions needs a folder with it') from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV file in UTF-8 ({error}): save it as one') from error
    absent = [name for name in ('image', 'lesion') if not rows or name not in rows[0]]
    if absent:
        raise UserError(f'{path} needs the columns image and lesion and a row below them; missing: {", ".join(absent)}')
    slices, faults = [], []
    for number, row in enumerate(rows, start=2):
        try:
            slices.append(_read_row(folder, row, size))
        except ValueError as error:
            faults.append(f'{LIST_NAME}:{number}: {error}')
    if faults:
        raise UserError(f'bad lesion slices in {folder}, mend them and run again: {join_faults(faults)}')
    return [s for s in slices if s.lesion.any()]


def _read_row(folder: Path, row: dict[str, str | None], size: int) -> LesionSlice:
    name = row['image'] or ''
    label = row.get('class') or _DEFAULT_CLASS
    if label not in CLASSES:
        raise ValueError(f'class {label!r} is not one of {", ".join(CLASSES)}')
    paths = []
    for part in (name, row['lesion'] or ''):
        path = (folder / part).resolve()
        if not part or not path.is_relative_to(folder.resolve()):
            raise ValueError(f'{part!r} is not a path inside the folder')
        paths.append(path)
    image, mask = _load_pair(*paths, None, size)
    return LesionSlice(name, row.get('patient') or name, CLASSES.index(label), image, mask, find_lung(image, mask))


def read_phantom_lesions(raw_dir: Path, rows: Sequence[Row], size: int) -> list[LesionSlice]:
    """Returns those of a phantom dataset's rows that show a lesion; none of a dataset without masks.

    Args:
      raw_dir: of `phantom.write_phantoms`, or any other.
      rows: of one of its lists.
      size: side of the slices for the networks, pixels.
    """
    slices = []
    for row in rows:
        mask_path = raw_dir / phantom.MASK_FOLDER / row.file
        if mask_path.exists():
            image, mask = _load_pair(raw_dir / phantom.IMAGE_FOLDER / row.file, mask_path, row.box, size)
            if mask.any():
                slices.append(LesionSlice(row.file, row.patient, row.label, image, mask, find_lung(image, mask)))
    return slices


def _load_pair(
    image_path: Path, mask_path: Path, box: preprocess.Box | None, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image uint8 [S, S, 1] and its mask, True where at least half of a pixel is lesion."""
    try:
        image = preprocess.load_slice(str(image_path), box, size)
    except ValueError as error:
        raise ValueError(f'{image_path.name}: {error}') from error
    try:
        with Image.open(image_path) as of_image, Image.open(mask_path) as of_mask:
            if of_image.size != of_mask.size:
                raise ValueError(f'it has {of_mask.size} pixels, its image {of_image.size}')
            mask = Image.fromarray((np.asarray(of_mask.convert('I')) > 0).astype(np.uint8) * 255)
    except (ValueError, OSError) as error:
        raise ValueError(f'{mask_path.name}: {error}') from error
    if box is not None:
        mask = mask.crop((max(box[0], 0), max(box[1], 0), min(box[2], mask.width), min(box[3], mask.height)))
    return image[..., np.newaxis], np.asarray(mask.resize((size, size), Image.Resampling.BOX)) >= 128


def find_lung(image: np.ndarray, lesion: np.ndarray) -> np.ndarray | None:
    """Finds the lungs by a simple rule: dark regions that hold no corner of the slice, what they enclose, the lesion.

    Args:
      image: uint8 [S, S, 1].
      lesion: bool [S, S].

    Returns:
      bool [S, S], or None if less than 5 % of the image is found: the rule has failed there.
    """
    grey = image[..., 0]
    regions, count = scipy.ndimage.label(grey < compute_otsu_threshold(grey))
    # Cropped to the body, a slice shows the air around it in its corners; cropped to the lungs, these at its sides.
    corners = regions[[0, 0, -1, -1], [0, -1, 0, -1]]
    areas = np.bincount(regions.ravel(), minlength=count + 1)
    kept = np.setdiff1d(np.flatnonzero(areas >= 0.005 * grey.size), [0, *corners])
    lung = scipy.ndimage.binary_fill_holes(np.isin(regions, kept) | lesion)
    return lung if lung.mean() >= MIN_LUNG else None


def compute_otsu_threshold(values: np.ndarray) -> float:
    """Returns the threshold that parts values best into a low and a high group (Otsu 1979), over 256 bins.

    Values below it are the low group; for constant values it is that value, and none lies below.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    counts, edges = np.histogram(values, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sums = np.cumsum(counts * centres)
    with np.errstate(divide='ignore', invalid='ignore'):
        means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (total - below)
    between = np.nan_to_num(below * (total - below) * (means[0] - means[1]) ** 2)
    # Bins without a value lie between the groups alike: the middle of them.
    best = np.flatnonzero(between == between.max())
    return float(edges[1:-1][best].mean())
