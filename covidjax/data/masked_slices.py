"""Slices with outlines as the readers of masked data return them, before they are resized."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from covidjax.data import lists, preprocess

# Codes of the masks. A pixel, and what is known of a slice, is a sum of them.
LUNGS, LESION, CONSOLIDATION = 1, 2, 4

# Pixel values of a mask, and of one that tells ground glass (1) from consolidation (2).
BINARY = ((0, 1), (0, 255))
KINDS = ((0, 1, 2),)


class Outlined(NamedTuple):
    """One whole slice and its outlines.

    Attributes:
      name: unique inside the folder.
      slice_index: place in the volume.
      spacing_mm: distances of rows, columns and slices, or None.
      grey: uint8 [H, W].
      masks: bool [H, W] by code, of the masks that exist.
    """

    name: str
    slice_index: int
    spacing_mm: tuple[float, float, float] | None
    grey: np.ndarray
    masks: dict[int, np.ndarray]


class Unit(NamedTuple):
    """What a folder lists: one slice, or one volume in a file.

    Attributes:
      where: for messages, in front of a fault.
      split: 'train', 'val' or 'test'.
      patient: patient ID; '' makes a patient of each slice.
      source: name of the source.
      volume: name of the scan; '' for a single slice.
      read: yields the slices; raises ValueError, with the reason on one line, for those that can't be used.
      work: the number of slices that take about as long to read.
    """

    where: str
    split: str
    patient: str
    source: str
    volume: str
    read: Callable[[], Iterator[Outlined]]
    work: int = 1


def combine_masks(
    lungs: np.ndarray | None, lesion: np.ndarray | None, kinds: np.ndarray | None
) -> dict[int, np.ndarray]:
    """Returns the masks of a slice by code.

    A slice without a lesion has no consolidation. In one with a lesion, consolidation is known from `kinds` alone.

    Args:
      lungs: bool [H, W] or None.
      lesion: bool [H, W] or None.
      kinds: uint8 [H, W] or None: 0 no lesion, 1 ground glass, 2 consolidation.
    """
    if kinds is not None:
        lesion = kinds > 0 if lesion is None else lesion | (kinds > 0)
    consolidation = None
    if kinds is not None:
        consolidation = kinds == 2
    elif lesion is not None and not lesion.any():
        consolidation = np.zeros_like(lesion)
    masks = {LUNGS: lungs, LESION: lesion, CONSOLIDATION: consolidation}
    return {code: mask for code, mask in masks.items() if mask is not None}


def read_grey(path: Path) -> np.ndarray:
    """Reads an image as grey uint8 [H, W]. Raises ValueError with its name for an unreadable one."""
    try:
        with preprocess.open_image(str(path)) as image:
            return np.asarray(preprocess.convert_grey(image))
    except ValueError as error:
        raise ValueError(f'{path.name}: {error}') from error


def read_mask(path: Path, shape: tuple[int, int], allowed: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Reads a mask as uint8 [H, W].

    Args:
      path: image with one channel.
      shape: height and width of its slice.
      allowed: sets of pixel values of which it must follow one.

    Raises:
      ValueError: it is unreadable, or has another size or other values; with the name of the file.
    """
    try:
        with preprocess.open_image(str(path)) as image:
            if len(image.getbands()) > 1:
                raise ValueError(f'a mask in colour ({image.mode}): save it with one channel')
            mask = np.asarray(image)
        if mask.shape != tuple(shape):
            raise ValueError(
                f'a mask of {mask.shape[1]} x {mask.shape[0]} pixels, its slice has {shape[1]} x {shape[0]}'
            )
        check_values(mask, allowed)
    except ValueError as error:
        raise ValueError(f'{path.name}: {error}') from error
    return mask.astype(np.uint8)


def check_values(mask: np.ndarray, allowed: tuple[tuple[int, ...], ...]) -> None:
    """Raises ValueError if the values of a mask lie in none of the sets in `allowed`."""
    values = np.unique(mask)
    if any(np.isin(values, some).all() for some in allowed):
        return
    shown = ', '.join(f'{value:g}' for value in values[:6].astype(float)) + (', ...' if len(values) > 6 else '')
    wanted = ' or '.join(', '.join(map(str, some)) for some in allowed)
    raise ValueError(f'a mask with the values {shown}; save it with {wanted}')


def read_metadata_sources(folder: Path) -> dict[str, str]:
    """Returns the source of each patient from metadata.csv; empty without that file or its column `source`.

    Raises:
      UserError: metadata.csv is unreadable (see `lists.read_metadata`).
    """
    path = folder / 'metadata.csv'
    if not path.exists():
        return {}
    patients = lists.read_metadata(str(path))
    return {patient: columns['source'] for patient, columns in patients.items() if columns.get('source')}
