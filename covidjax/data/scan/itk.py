"""Reads MetaImage and NRRD with SimpleITK, an optional package: pip install covidjax[itk]."""

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from covidjax.data.scan.sources import Entry
from covidjax.errors import UserError

ENDINGS = ('.mha', '.mhd', '.nrrd', '.nhdr')
_DATA_FILE = re.compile(rb'^(?:ElementDataFile *=|data ?file:) *(.*?)\r?$', re.MULTILINE | re.IGNORECASE)


def read_planes(entry: Entry, max_voxels: int) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Reads a scan.

    Args:
      entry: a file on disk.
      max_voxels: the most that are read.

    Returns:
      One scan [planes, rows, columns], in the file's order, mapped from a deleted file into memory; the affine [4, 4]
      from (plane, row, column) to mm, RAS; the SHA-256 of the voxels.

    Raises:
      UserError: SimpleITK is not installed; the file is damaged, not one scan of scalars, or names data elsewhere.
    """
    if importlib.util.find_spec('SimpleITK') is None:
        raise UserError("MetaImage and NRRD need SimpleITK: pip install 'covidjax[itk]', or convert to NIfTI")
    if entry.path is None:
        raise UserError('MetaImage and NRRD are not read from zip archives: unpack it and name the file')
    with entry.path.open('rb') as file:
        for name in _DATA_FILE.findall(file.read(100_000).split(b'\n\n')[0]):
            # Otherwise a header could show the bytes of any file as a picture.
            if re.search(rb'[/\\]', name):
                raise UserError('its data lie in another folder: put header and data side by side')
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            '-P',
            str(Path(__file__).with_name('itk_process.py')),
            str(entry.path.absolute()),
            folder,
            str(max_voxels),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors='replace')
        if done.returncode == 1 and done.stderr.strip():
            raise UserError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise UserError('a damaged MetaImage or NRRD, on which SimpleITK crashes: copy it again')
        voxels, affine = np.load(f'{folder}/voxels.npy', mmap_mode='r'), np.load(f'{folder}/affine.npy')
        # An open mapping stays readable after its file is deleted.
    digest = hashlib.sha256()
    for plane in voxels:
        digest.update(np.ascontiguousarray(plane))
    return voxels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, digest.digest()
