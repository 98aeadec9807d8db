"""Checks that voxels are Hounsfield units, and brings them to the range of scanners."""

import numpy as np

from covidjax.data.scan.dicom import HU_RANGE
from covidjax.errors import UserError

_MIN_AIR, _MIN_TISSUE, _MAX_METAL = 0.02, 0.02, 0.02  # limits, as shares of the voxels


def round_plane(voxels: np.ndarray) -> np.ndarray:
    """Returns one plane of voxels as int16 Hounsfield units; converting the whole scan takes four times the memory."""
    if voxels.dtype.kind not in 'iuf':
        raise UserError('voxels in colour or of complex numbers: they must be Hounsfield units')
    if not np.isfinite(voxels).all():
        raise UserError('NaN or infinite voxels: replace them by -1024, the value of air')
    return np.clip(np.round(voxels), *HU_RANGE).astype(np.int16)


class HounsfieldCheck:
    """Checks plane by plane that voxels look like Hounsfield units of a body in air; looks at every fourth pixel."""

    def __init__(self):
        self._counts = np.zeros(4, np.int64)  # all, air, soft tissue, metal
        self._low, self._high = np.inf, -np.inf

    def add(self, hu_HxW: np.ndarray) -> None:
        """Counts the voxels of one plane."""
        some = hu_HxW[::2, ::2]
        air, tissue, metal = some < -700, (some > -200) & (some < 300), some >= HU_RANGE[1]
        self._counts += (some.size, air.sum(), tissue.sum(), metal.sum())
        self._low, self._high = min(self._low, some.min()), max(self._high, some.max())

    def finish(self) -> None:
        """Raises UserError for too little air or soft tissue (2 % each) or too much metal (more than 2 %)."""
        air, tissue, metal = self._counts[1:] / max(self._counts[0], 1)
        if air < _MIN_AIR or tissue < _MIN_TISSUE or metal > _MAX_METAL:
            raise UserError(
                f'values from {self._low} to {self._high}, {air:.0%} air and {tissue:.0%} soft tissue, are not the '
                'Hounsfield units of a chest: store true units, or window the slices and pass them as images'
            )
