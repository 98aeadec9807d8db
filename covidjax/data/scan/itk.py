"""Reads MetaImage and NRRD with SimpleITK, an optional package: pip install covidjax[itk]."""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from covidjax.data.scan.sources import Entry
from covidjax.errors import UserError

ENDINGS = ('.mha', '.mhd', '.nrrd', '.nhdr')
_DATA_FILE = re.compile(rb'^(?:ElementDataFile *=|data ?file:) *(.*?)\r?$', re.MULTILINE | re.IGNORECASE)


def read_planes(entry: Entry, max_voxels: int) -> tuple[Iterator[np.ndarray], np.ndarray, bytes]:
    """Reads a scan.

    Args:
      entry: a file on disk.
      max_voxels: the most that are read.

    Returns:
      Planes [rows, columns] of one scan, in the file's order; the affine [4, 4] from (plane, row, column) to mm, RAS;
      the SHA-256 of the voxels.

    Raises:
      UserError: SimpleITK is not installed; the file is damaged, not one scan of scalars, or names data elsewhere.
    """
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise UserError(
            "MetaImage and NRRD need SimpleITK: pip install 'covidjax[itk]', or convert to NIfTI"
        ) from error
    if entry.path is None:
        raise UserError('MetaImage and NRRD are not read from zip archives: unpack it and name the file')
    with entry.path.open('rb') as file:
        for name in _DATA_FILE.findall(file.read(100_000).split(b'\n\n')[0]):
            # Otherwise a header could show the bytes of any file as a picture.
            if re.search(rb'[/\\]', name):
                raise UserError('its data lie in another folder: put header and data side by side')
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(entry.path))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.ReadImageInformation()
        size = reader.GetSize()
        if len(size) == 4 and size[3] == 1:
            size = size[:3]
        if len(size) != 3 or not 0 < np.prod(size, dtype=float) <= max_voxels:
            raise UserError(
                f'of shape {" x ".join(map(str, size))}: it must be one scan of at most {max_voxels:,} voxels'
            )
        if reader.GetNumberOfComponents() != 1:
            raise UserError('voxels in colour or of complex numbers: they must be Hounsfield units')
        image = reader.Execute()
    except RuntimeError as error:
        raise UserError(
            'a damaged or truncated MetaImage or NRRD, or its data file is missing: copy it again'
        ) from error
    voxels = sitk.GetArrayViewFromImage(image).reshape(size[::-1])
    dimension = image.GetDimension()
    axes = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3] * np.array(image.GetSpacing()[:3])
    affine = np.eye(4)
    affine[:3] = np.column_stack([axes[:, ::-1], image.GetOrigin()[:3]])
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    digest = hashlib.sha256()
    for plane in voxels:
        digest.update(plane)
    # The array is a view: the planes keep the image alive.
    return (plane for plane, _ in ((plane, image) for plane in voxels)), affine, digest.digest()
