"""Opens NIfTI files, whose planes are then read one by one."""

import contextlib
import errno
import gzip
import io
import logging
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np

from covidjax.data.scan import dicom
from covidjax.data.scan.sources import MAX_BYTES
from covidjax.errors import TooLargeError, UserError

_GZIP = b'\x1f\x8b'
_BLOCK = 1_000_000  # bytes


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


Opened = tuple[nibabel.Nifti1Image, tuple[int, int, int]]


def open_nifti(data: bytes) -> Opened:
    """Opens one scan in memory. Use it, and read voxels, inside `report_damage`.

    Args:
      data: of a .nii or .nii.gz. It is unpacked at once, so that planes can be read one by one.

    Returns:
      The image and its shape; a fourth axis of length 1 is left out of the shape.

    Raises:
      UserError: it unpacks to more than `MAX_BYTES`, or is no single scan of at most `dicom.MAX_VOXELS` voxels.
    """
    file = io.BytesIO(data)
    if data[:2] == _GZIP:
        file = io.BytesIO()
        _unpack(io.BytesIO(data), file)
    return _open(file)


@contextlib.contextmanager
def open_nifti_file(path: Path) -> Iterator[Opened]:
    """Yields what `open_nifti` returns of a file, of which only the planes that are read are ever in memory.

    A packed file is unpacked into a temporary one.

    Raises:
      UserError: as `open_nifti`, or there is no room for the temporary file.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open('rb'))
        if file.read(2) == _GZIP:
            file.seek(0)
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            try:
                _unpack(file, unpacked)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                where = tempfile.gettempdir()
                raise UserError(f'no room to unpack it in {where}: free some, or set TMPDIR') from error
            file = unpacked
        yield _open(file)


def _unpack(packed: BinaryIO, unpacked: BinaryIO) -> None:
    size = 0
    with gzip.open(packed) as file:
        while block := file.read(_BLOCK):
            size += len(block)
            if size > MAX_BYTES:
                raise TooLargeError(f'unpacks to more than {MAX_BYTES / 1e9:.0f} GB, taken for a bomb')
            unpacked.write(block)


def _open(file: BinaryIO) -> Opened:
    file.seek(0)
    image = nibabel.Nifti1Image.from_stream(file)
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3 or not 0 < np.prod(shape, dtype=float) <= dicom.MAX_VOXELS:
        raise UserError(f'a NIfTI of shape {shape}: it must be one scan of at most {dicom.MAX_VOXELS:,} voxels')
    return image, shape
