"""Opens NIfTI files from their bytes."""

import contextlib
import gzip
import io
import logging
import warnings
import zlib
from collections.abc import Iterator

import nibabel
import numpy as np

from covidjax.data.scan import dicom
from covidjax.data.scan.sources import MAX_BYTES
from covidjax.errors import TooLargeError, UserError


@contextlib.contextmanager
def report_damage() -> Iterator[None]:
    """Silences nibabel and turns its errors inside the block into a UserError: damaged files can raise anything."""
    logger = logging.getLogger('nibabel.global')
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError('a damaged or truncated .nii.gz: copy it again') from error
    except Exception as error:
        raise UserError('a damaged or truncated NIfTI, or not a single-file one: copy it again') from error
    finally:
        logger.disabled = before


def open_nifti(data: bytes) -> tuple[nibabel.Nifti1Image, tuple[int, int, int]]:
    """Opens one scan. Use it, and read voxels, inside `report_damage`.

    Args:
      data: of a .nii or .nii.gz. It is unpacked at once, so that planes can be read one by one.

    Returns:
      The image and its shape; a fourth axis of length 1 is left out of the shape.

    Raises:
      UserError: it unpacks to more than `MAX_BYTES`, or is no single scan of at most `dicom.MAX_VOXELS` voxels.
    """
    if data[:2] == b'\x1f\x8b':
        with gzip.open(io.BytesIO(data)) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise TooLargeError(f'unpacks to more than {MAX_BYTES / 1e9:.0f} GB, taken for a bomb')
    image = nibabel.Nifti1Image.from_bytes(data)
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or not 0 < np.prod(shape, dtype=float) <= dicom.MAX_VOXELS:
        raise UserError(f'a NIfTI of shape {shape}: it must be one scan of at most {dicom.MAX_VOXELS:,} voxels')
    return image, shape
