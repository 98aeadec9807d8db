"""Slices with lesion masks, which score a model's maps, and masks of training slices, which teach its attention.

There are two sources: phantoms, which have exact masks, and folders in the format of `read_lesion_folder`.
"""

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from covidjax.data import phantom, preprocess
from covidjax.data.lists import CLASSES, Row
from covidjax.data.masked_slices import LESION
from covidjax.data.slice_lungs import find_dark_lungs
from covidjax.errors import UserError, join_faults

LIST_NAME = 'slices.csv'
_DEFAULT_CLASS = 'covid19'


class LesionSlice(NamedTuple):
    """One slice with its lesion mask.

    Attributes:
      name: image name.
      patient: patient ID, or `name` if the list has none, so that such a slice counts as its own patient.
      label: index into `CLASSES`.
      image: uint8 [S, S, 1], the network input.
      lesion: bool [S, S] with at least one True pixel.
      lung: bool [S, S] including the lesion, or None where `slice_lungs.find_dark_lungs` fails.
    """

    name: str
    patient: str
    label: int
    image: np.ndarray
    lesion: np.ndarray
    lung: np.ndarray | None


def read_lesion_folder(folder: Path, size: int, region: str = 'body') -> list[LesionSlice]:
    """Reads a folder of slices and lesion masks listed in `slices.csv`.

    The columns `image` and `lesion` hold the paths of a slice and its mask, relative to the folder. Both images have
    the same size; nonzero mask pixels are lesion. The columns `patient` and `class` (one of `CLASSES`, default covid19)
    are optional; other columns are ignored. Crop the slices to the body first. Slices with an empty mask are
    skipped.

    Args:
      folder: folder of the list.
      size: side of the returned slices in pixels.

    Raises:
      UserError: the list or a column is missing, or slices are unreadable (all counted, the first 20 named).
    """
    slices, faults = [], []
    for number, row in enumerate(_read_list(folder), start=2):
        try:
            slices.append(_read_row(folder, row, size, region))
        except ValueError as error:
            faults.append(f'{LIST_NAME}:{number}: {error}')
    if faults:
        raise UserError(f'bad lesion slices in {folder}, fix them and run again: {join_faults(faults)}')
    return [s for s in slices if s.lesion.any()]


def _read_list(folder: Path) -> list[dict[str, str | None]]:
    """Returns the rows of slices.csv, which has the columns image and lesion."""
    path = folder / LIST_NAME
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(
            f'{path} cannot be read ({error.strerror}): --outlines and --config.data.outlines need a folder with it'
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is not a CSV file in UTF-8 ({error}): save it as one') from error
    absent = [name for name in ('image', 'lesion') if not rows or name not in rows[0]]
    if absent:
        raise UserError(f'{path} needs the columns image and lesion and a row below them; missing: {", ".join(absent)}')
    return rows


def _find_pair(folder: Path, row: dict[str, str | None]) -> tuple[Path, Path]:
    """Returns the paths of image and mask. Raises ValueError if one is outside the folder."""
    paths = []
    for part in (row['image'] or '', row['lesion'] or ''):
        path = (folder / part).resolve()
        if not part or not path.is_relative_to(folder.resolve()):
            raise ValueError(f'{part!r} is not a path inside the folder')
        paths.append(path)
    return paths[0], paths[1]


def _read_row(folder: Path, row: dict[str, str | None], size: int, region: str) -> LesionSlice:
    name = row['image'] or ''
    label = row.get('class') or _DEFAULT_CLASS
    if label not in CLASSES:
        raise ValueError(f'class {label!r} is not one of {", ".join(CLASSES)}')
    image, mask = _load_pair(*_find_pair(folder, row), None, size, region)
    return LesionSlice(
        name, row.get('patient') or name, CLASSES.index(label), image, mask, find_dark_lungs(image[..., 0], mask)
    )


def read_phantom_lesions(raw_dir: Path, rows: Sequence[Row], size: int, region: str = 'body') -> list[LesionSlice]:
    """Returns the rows of a phantom dataset that show a lesion; an empty list if the dataset has no masks.

    Args:
      raw_dir: raw directory, of phantoms or any other dataset.
      rows: rows of one of its lists.
      size: side of the returned slices in pixels.
    """
    slices = []
    for row in rows:
        mask_path = raw_dir / phantom.MASK_FOLDER / row.file
        if mask_path.exists():
            image, mask = _load_pair(raw_dir / phantom.IMAGE_FOLDER / row.file, mask_path, row.box, size, region)
            if mask.any():
                slices.append(
                    LesionSlice(row.file, row.patient, row.label, image, mask, find_dark_lungs(image[..., 0], mask))
                )
    return slices


class TaughtSource(Sequence):
    """Records of a training split with the lesions that are outlined, for `losses.add_attention_loss`.

    Args:
      records: see `covidx_ct.SliceSource`.
      masks: from `read_phantom_masks` or `match_masks`.
    """

    def __init__(self, records: Sequence[dict[str, Any]], masks: Mapping[int, np.ndarray]):
        self._records, self._masks = records, masks

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the record and 'masks' uint8 [S, S, 1]: the code `masked.LESION` in a lesion, else 0."""
        record = self._records[index]
        mask = self._masks.get(index)
        lesion = np.zeros(record['image'].shape, bool) if mask is None else mask[..., np.newaxis]
        return {**record, 'masks': lesion * np.uint8(LESION)}


def read_phantom_masks(raw_dir: Path, rows: Sequence[Row], size: int, region: str) -> dict[int, np.ndarray]:
    """Returns the lesions bool [S, S] of the rows of a phantom dataset that have some, by index of the row."""
    masks = {}
    for index, row in enumerate(rows):
        path = raw_dir / phantom.MASK_FOLDER / row.file
        if path.exists():
            masks[index] = _load_pair(raw_dir / phantom.IMAGE_FOLDER / row.file, path, row.box, size, region)[1]
    return masks


def match_masks(
    folders: Sequence[Path], images: Path, rows: Sequence[Row], size: int, region: str
) -> dict[int, np.ndarray]:
    """Finds the rows of a dataset whose pixels are those of an outlined slice.

    Args:
      folders: see `read_lesion_folder`; their slices are whole.
      images: image folder of the dataset.
      rows: of one of its lists.
      size, region: see `preprocess.load_slice`.

    Returns:
      Lesions bool [S, S], prepared like the slices, by index of the row; slices without a lesion are left out.

    Raises:
      UserError: a folder can't be read, or no row has an outline.
    """
    outlined = dict(_hash_outlined(folders))
    sizes = {size for size, _ in outlined}
    masks = {}
    for index, row in enumerate(rows):
        path = images / row.file
        with preprocess.open_image(str(path)) as image:
            if image.size in sizes and (mask_path := outlined.get(_hash(image))):
                mask = _load_pair(path, mask_path, row.box, size, region)[1]
                if mask.any():
                    masks[index] = mask
    if not masks:
        raise UserError(
            f'no training slice has the pixels of an outlined slice with a lesion in {", ".join(map(str, folders))}: '
            'pass the folder that outlines these slices as --config.data.outlines, or none'
        )
    return masks


def _hash_outlined(folders: Sequence[Path]) -> Iterator[tuple[tuple[tuple[int, int], bytes], Path]]:
    """Yields size and hash of every outlined slice, and the path of its mask."""
    for folder in folders:
        for number, row in enumerate(_read_list(folder), start=2):
            try:
                image_path, mask_path = _find_pair(folder, row)
                with preprocess.open_image(str(image_path)) as image:
                    yield _hash(image), mask_path
            except ValueError as error:
                raise UserError(f'{folder / LIST_NAME}:{number}: {error}') from error


def _hash(image: Image.Image) -> tuple[tuple[int, int], bytes]:
    return image.size, hashlib.sha256(np.asarray(preprocess.convert_grey(image)).tobytes()).digest()


def _load_pair(
    image_path: Path, mask_path: Path, box: preprocess.Box | None, size: int, region: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns an image uint8 [S, S, 1] and its mask bool [S, S], True where lesion covers at least half of a pixel."""
    try:
        with preprocess.open_image(str(image_path)) as of_image:
            grey, place = preprocess.cut_region(of_image, box, region)
    except ValueError as error:
        raise ValueError(f'{image_path.name}: {error}') from error
    try:
        with Image.open(image_path) as of_image, Image.open(mask_path) as of_mask:
            if of_image.size != of_mask.size:
                raise ValueError(f'it has {of_mask.size} pixels, its image {of_image.size}')
            mask = Image.fromarray((np.asarray(of_mask.convert('I')) > 0).astype(np.uint8) * 255)
    except (ValueError, OSError) as error:
        raise ValueError(f'{mask_path.name}: {error}') from error
    small = mask.crop(place).resize((size, size), Image.Resampling.BOX)
    return preprocess.resize(grey, size)[..., np.newaxis], np.asarray(small) >= 128
