import itertools

import nibabel
import numpy as np
import pytest
from PIL import Image

from covidjax.data.lungs import LungsGrid
from covidjax.data.scan.volume import read_volume
from covidjax.evaluation.burden import measure_burden
from covidjax.predict import masks
from tests.scan_files import create_nifti, make_chest, write_images, write_series

HU = make_chest(20)
LABELS = np.select([HU == -300, (HU < -700) & (HU > -800), HU < -700], [3, 2, 1], 0).astype(np.uint8)
ORIENTATIONS = [
    ''.join(codes) for axes in itertools.permutations(('LR', 'AP', 'SI')) for codes in itertools.product(*axes)
]


def check_overlay(path, labels, hu):
    """Checks that mask and scan agree at every voxel."""
    mask = nibabel.load(path)
    scan = np.asarray(hu.dataobj)
    assert mask.shape == scan.shape
    np.testing.assert_array_equal(mask.affine, hu.affine)
    found = np.asarray(mask.dataobj)
    assert found.dtype == np.uint8
    pairs = {(int(value), int(label)) for value, label in zip(scan.ravel(), found.ravel(), strict=True)}
    assert pairs == {(int(value), int(label)) for value, label in zip(HU.ravel(), labels.ravel(), strict=True)}


@pytest.mark.parametrize('codes', ORIENTATIONS)
def test_nifti_of_any_orientation(tmp_path, codes):
    scan = create_nifti(HU, tuple(codes))
    nibabel.save(scan, tmp_path / 'scan.nii.gz')
    volume = read_volume(tmp_path / 'scan.nii.gz')
    masks.write_nifti(tmp_path / 'masks.nii.gz', list(LABELS), volume.affine)
    check_overlay(tmp_path / 'masks.nii.gz', LABELS, nibabel.load(tmp_path / 'scan.nii.gz'))


def test_an_oblique_nifti_keeps_its_affine(tmp_path):
    scan = create_nifti(HU, ('L', 'P', 'S'))
    angle = np.radians(12)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    for shear in (0.0, 0.2):
        affine = scan.affine.copy()
        affine[:3, :3] = turn @ affine[:3, :3]
        affine[1, 2] += shear
        affine[:3, 3] = (-100, 20, 1300)
        nibabel.save(nibabel.Nifti1Image(np.asarray(scan.dataobj), affine), tmp_path / 'scan.nii.gz')
        volume = read_volume(tmp_path / 'scan.nii.gz')
        masks.write_nifti(tmp_path / 'masks.nii.gz', list(LABELS), volume.affine)
        check_overlay(tmp_path / 'masks.nii.gz', LABELS, nibabel.load(tmp_path / 'scan.nii.gz'))
        header = nibabel.load(tmp_path / 'masks.nii.gz').header
        assert (int(header['sform_code']), int(header['qform_code'])) == (1, 0 if shear else 1)
        assert header.get_xyzt_units()[0] == 'mm'


@pytest.mark.parametrize('flip', [False, True])
def test_dicom_by_the_positions_of_its_headers(tmp_path, flip):
    volume = read_volume(write_series(tmp_path / 'scan', HU, flip=flip))
    masks.write_nifti(tmp_path / 'masks.nii.gz', list(LABELS), volume.affine)
    mask = nibabel.load(tmp_path / 'masks.nii.gz')
    found = np.asarray(mask.dataobj)
    # Voxel (column c, row r, slice t) of make_dicom lies at c - 31.5, r - 31.5 and -5 t mm, LPS.
    rng = np.random.default_rng(0)
    for t, r, c in rng.integers(0, HU.shape, (200, 3)):
        place = np.linalg.inv(mask.affine) @ (31.5 - c, 31.5 - r, -5 * t, 1)
        i, j, k = np.round(place[:3]).astype(int)
        np.testing.assert_allclose(place[:3], (i, j, k), atol=1e-4)
        assert found[i, j, k] == LABELS[t, r, c]


def test_images_have_no_geometry(tmp_path):
    grey = np.clip((HU + 1350) // 6, 0, 255).astype(np.uint8)
    assert read_volume(write_images(tmp_path / 'png', grey)).affine is None


def test_overlays_are_the_slices_but_for_the_outlines(tmp_path):
    grey = np.clip((HU + 1350) // 6, 0, 255).astype(np.uint8)
    labels = list(LABELS)
    paths = masks.write_overlays(tmp_path, list(grey), labels, [0, 11])
    assert [path.name for path in paths] == ['slice_001.png', 'slice_012.png']
    with Image.open(paths[1]) as image:
        picture = np.asarray(image)
    assert picture.shape == (64, 64, 3)
    is_line = np.ptp(picture, axis=-1) > 0
    np.testing.assert_array_equal(picture[~is_line], grey[11][~is_line][:, np.newaxis].repeat(3, -1))
    assert 0 < is_line.sum() < (labels[11] > 0).sum()
    assert not is_line[labels[11] == 0].any()


def test_labels_agree_with_the_burden():
    shape = (6, 66, 66)
    lungs, lesion = (np.zeros((6, 22, 22), bool) for _ in range(2))
    lungs[1:5, 4:18, 2:20] = True
    lesion[2, 8:14, 0:8] = True
    grid = LungsGrid(np.full(lungs.shape, -800, np.float16), lungs, (1, 3, 3), (4.0, 1.0, 1.0), shape)
    probabilities = np.stack([lungs, 0.6 * lesion, lesion], -1).astype(np.float16)
    probabilities[2, :, 4:, 2] = 0
    found = measure_burden(probabilities, grid, threshold=0.3)
    labels = masks.create_labels(probabilities, found, grid, [shape[1:]] * 6)
    voxel_ml = 0.004
    assert (np.array(labels) > 0).sum() * voxel_ml == pytest.approx(found.whole.lungs_ml, rel=0.01)
    assert (np.array(labels) >= 2).sum() * voxel_ml == pytest.approx(found.whole.lesions_ml, rel=0.05)
    assert (np.array(labels) == 3).sum() * voxel_ml == pytest.approx(found.whole.consolidation_ml, rel=0.1)
    assert not labels[0].any()
    assert labels[2][33, 3] == 0  # a lesion outside the lungs
    assert (labels[2][33, 8], labels[2][33, 18], labels[2][33, 40]) == (3, 2, 1)
    # Slices of images may differ in size.
    alone = measure_burden(probabilities, None, threshold=0.3)
    shapes = [(40 + i, 60) for i in range(6)]
    assert [of.shape for of in masks.create_labels(probabilities, alone, None, shapes)] == shapes
