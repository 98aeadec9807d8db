"""Reads one MetaImage or NRRD in a process of its own: `python itk_process.py SCAN FOLDER MAX_VOXELS`.

SimpleITK crashes on some damaged headers. Writes voxels.npy [planes, rows, columns] and affine.npy, in LPS, to FOLDER.
A reason to refuse the file is printed, with exit status 1.
"""

import sys

import numpy as np
import SimpleITK as sitk


def read(path: str, folder: str, max_voxels: int) -> None:
    """Reads and writes; see above."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    size = reader.GetSize()
    if len(size) == 4 and size[3] == 1:
        size = size[:3]
    if len(size) != 3 or not 0 < np.prod(size, dtype=float) <= max_voxels:
        sys.exit(f'of shape {" x ".join(map(str, size))}: it must be one scan of at most {max_voxels:,} voxels')
    if reader.GetNumberOfComponents() != 1:
        sys.exit('voxels in colour or of complex numbers: they must be Hounsfield units')
    image = reader.Execute()
    np.save(f'{folder}/voxels.npy', sitk.GetArrayViewFromImage(image).reshape(size[::-1]))
    dimension = image.GetDimension()
    axes = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3] * np.array(image.GetSpacing()[:3])
    affine = np.eye(4)
    affine[:3] = np.column_stack([axes[:, ::-1], image.GetOrigin()[:3]])
    np.save(f'{folder}/affine.npy', affine)


if __name__ == '__main__':
    try:
        read(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except Exception:  # damaged headers can raise anything
        sys.exit('a damaged or truncated MetaImage or NRRD, or its data file is missing: copy it again')
