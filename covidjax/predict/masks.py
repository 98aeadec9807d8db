"""Masks of lungs, lesions and consolidation in the geometry of a scan.

Shapes: H, W of a slice; h, w the grid of the model's outputs.
"""

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from covidjax.data.lungs import LungsGrid
from covidjax.data.preprocess import resize_probabilities
from covidjax.data.scan.volume import restore_axes
from covidjax.evaluation.burden import Burden
from covidjax.evaluation.segmentation import CONSOLIDATION_THRESHOLD, LUNGS_THRESHOLD
from covidjax.files import replace_file
from covidjax.report.pictures import outline_labels

LABELS = {1: 'lungs', 2: 'lesion', 3: 'consolidation'}


def create_labels(
    probabilities_Txhxwx3: np.ndarray, burden: Burden, grid: LungsGrid | None, shapes: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Returns the masks of all slices, from head to feet: uint8 [H, W], 0 or a key of `LABELS`.

    Args:
      probabilities_Txhxwx3: of lungs, of lesion, and of consolidation given lesion, of whole slices.
      burden: measured from them; its lungs and its threshold are used.
      grid: the one it was measured with, if any.
      shapes: H, W of each slice.
    """
    labels = []
    for place, (probabilities_hxwx3, shape) in enumerate(zip(probabilities_Txhxwx3, shapes, strict=True)):
        lungs = None if grid is None else grid.enlarge(burden.lungs_txGxV[place // grid.steps[0]])
        labels.append(label_slice(probabilities_hxwx3, lungs, burden.threshold, shape))
    return labels


def label_slice(
    probabilities_hxwx3: np.ndarray, lungs: np.ndarray | None, threshold: float, shape: tuple[int, int]
) -> np.ndarray:
    """Returns the mask of one slice: uint8 [H, W], 0 or a key of `LABELS`.

    Args:
      probabilities_hxwx3: of the slice.
      lungs: its lungs, bool of any size; None takes those of the model.
      threshold: of the lesion probability.
      shape: H, W.
    """
    lungs_HxW, lesion_HxW, dense_HxW = np.moveaxis(resize_probabilities(probabilities_hxwx3, shape), -1, 0)
    is_lungs = lungs_HxW > LUNGS_THRESHOLD
    if lungs is not None:
        is_lungs = lungs if lungs.shape == shape else resize_probabilities(lungs[..., np.newaxis], shape)[..., 0] >= 0.5
    labels = is_lungs.astype(np.uint8)
    labels[is_lungs & (lesion_HxW >= threshold)] = 2
    labels[(labels == 2) & (dense_HxW >= CONSOLIDATION_THRESHOLD)] = 3
    return labels


def write_nifti(path: Path, labels: Sequence[np.ndarray], affine: np.ndarray) -> None:
    """Writes masks as NIfTI that covers the scan voxel by voxel.

    Args:
      path: ends in .nii.gz.
      labels: of all slices, from head to feet; all of one shape.
      affine: of the scan, see `Volume.affine`.
    """
    image = nibabel.Nifti1Image(restore_axes(np.stack(labels), affine), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(affine, code=0)  # a quaternion cannot hold the shear of a tilted scan
    image.header.set_xyzt_units('mm')
    with replace_file(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_overlays(
    folder: Path, slices: Sequence[np.ndarray], labels: Sequence[np.ndarray], places: Iterable[int]
) -> list[Path]:
    """Writes slices with outlines as PNG named by their number, e.g. slice_042.png, and returns the paths.

    Args:
      folder: exists.
      slices: of the scan, uint8 [H, W] each.
      labels: of all slices.
      places: indices of the slices to write, from 0.
    """
    paths = []
    for place in places:
        paths.append(folder / f'slice_{place + 1:03}.png')
        with replace_file(paths[-1]) as temporary:
            Image.fromarray(outline_labels(slices[place], labels[place])).save(temporary)
    return paths
