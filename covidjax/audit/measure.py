"""Reads every listed image once and keeps the measurements for the checks: about 1.1 KB per image."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
from PIL import Image

from covidjax.data import preprocess
from covidjax.data.lists import Row
from covidjax.evaluation.baselines import THUMBNAIL_SIZE
from covidjax.progress import open_progress

_BATCH_SIZE = 32


class Images(NamedTuple):
    """Measurements of the N images that could be read.

    Attributes:
      index: file -> its position in the arrays below.
      faults: file -> why it could not be read.
      sizes: width and height, int [N, 2].
      modes: Pillow mode of each image.
      digests: hash of size and 8-bit grey pixels.
      ranges: lowest, highest and mean grey value, 0 to 255, float [N, 3].
      thumbnails: of the whole images, uint8 [N, S, S].
      crops: file -> thumbnail of its box, uint8 [S, S], for the requested files whose box overlaps the image.
    """

    index: dict[str, int]
    faults: dict[str, str]
    sizes: np.ndarray
    modes: list[str]
    digests: list[bytes]
    ranges: np.ndarray
    thumbnails: np.ndarray
    crops: dict[str, np.ndarray]


def measure_images(rows: Sequence[Row], folder: Path, crop_files: set[str]) -> Images:
    """Measures images on all cores and shows a progress bar.

    Args:
      rows: one per image.
      folder: the image folder.
      crop_files: files whose box is kept as a thumbnail.
    """
    batches = [rows[start : start + _BATCH_SIZE] for start in range(0, len(rows), _BATCH_SIZE)]
    # Threads suffice: decoding, resizing and hashing release the GIL.
    parallel = joblib.Parallel(n_jobs=-1, backend='threading', return_as='generator')
    faults, index, modes, digests, crops = {}, {}, [], [], {}
    sizes, ranges = np.zeros((len(rows), 2), np.int32), np.zeros((len(rows), 3), np.float32)
    thumbnails = np.zeros((len(rows), THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
    with warnings.catch_warnings(), open_progress('images', len(rows), 'slice') as progress:
        # `_measure_image` rejects these images itself.
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        for batch, results in zip(
            batches, parallel(joblib.delayed(_measure_batch)(b, folder, crop_files) for b in batches), strict=True
        ):
            for row, measured in zip(batch, results, strict=True):
                if measured is None:
                    faults[row.file] = ''
                    continue
                i = index[row.file] = len(index)
                mode, digest, sizes[i], ranges[i], thumbnails[i], crop = measured
                modes.append(mode)
                digests.append(digest)
                if crop is not None:
                    crops[row.file] = crop
            progress.update(len(batch))
    for file in faults:
        faults[file] = _explain_fault(folder / file)
    n = len(index)
    return Images(index, faults, sizes[:n], modes, digests, ranges[:n], thumbnails[:n], crops)


def _measure_batch(rows: Sequence[Row], folder: Path, crop_files: set[str]) -> list[tuple | None]:
    return [_measure_image(folder / row.file, row.box if row.file in crop_files else None) for row in rows]


def _measure_image(path: Path, box: preprocess.Box | None) -> tuple | None:
    """Returns mode, digest, size, range, thumbnail and crop of an image; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > preprocess.MAX_PIXELS:
                return None
            mode = image.mode
            grey = preprocess.convert_grey(image)
    except Exception:  # decoders of damaged files may raise anything
        return None
    pixels = np.asarray(grey)
    digest = hashlib.blake2b(b'%d %d ' % pixels.shape + pixels.tobytes(), digest_size=16).digest()
    thumbnail = np.asarray(grey.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX))
    try:
        crop = None if box is None else preprocess.crop_grey_resize(grey, box, THUMBNAIL_SIZE)
    except ValueError:  # the box does not overlap the image
        crop = None
    return mode, digest, grey.size, (pixels.min(), pixels.max(), pixels.mean()), thumbnail, crop


def _explain_fault(path: Path) -> str:
    """Returns the reason for which preparation rejects an image."""
    try:
        preprocess.load_slice(os.fspath(path), None, 1)
    except ValueError as error:
        return str(error)
    return 'unreadable'


def list_files(folder: Path) -> set[str]:
    """Returns the files below a folder, without hidden ones: relative paths with forward slashes."""
    found = set()
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        inner = os.path.relpath(path, folder).replace(os.sep, '/')
        prefix = '' if inner == '.' else f'{inner}/'
        found.update(f'{prefix}{name}' for name in names if not name.startswith('.'))
    return found
