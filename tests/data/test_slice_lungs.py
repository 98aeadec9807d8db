import csv

import numpy as np
import pytest
from PIL import Image

from covidjax.data import phantom, slice_lungs


def load_grey(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('L'))


@pytest.fixture(scope='module')
def phantoms():
    options = phantom.PhantomOptions(image_size=128)
    scans = [phantom.render_scan(options, 'train', patient, patient % 3) for patient in range(6)]
    return [parts for scan in scans for parts in zip(*scan, strict=True)]  # image, lesion, box of each slice


def test_phantom_slices(phantoms):
    kept, leaks, num_failed = [], [], 0
    for grey, lesion, (xmin, ymin, xmax, ymax) in phantoms:
        before = grey.copy()
        found = slice_lungs.find_lungs_in_slice(grey)
        np.testing.assert_array_equal(grey, before)
        if found is None:
            num_failed += 1
            continue
        assert found.dtype == bool
        inside = found[ymin:ymax, xmin:xmax]
        leaks.append(1 - inside.sum() / found.sum())
        assert 0.05 < inside.mean() < 0.7
        if lesion.any():
            kept.append((found & lesion).sum() / lesion.sum())
    assert num_failed == 0
    assert np.mean(leaks) < 0.05  # outside the body; the model was trained on real slices only
    assert np.mean(kept) > 0.8


def test_cut_slices_stay_as_they_are(phantoms):
    for grey, *_ in phantoms[::5]:
        assert not slice_lungs.is_cut_to_lungs(grey)
        cut, _ = slice_lungs.cut_to_lungs(grey, slice_lungs.find_lungs_in_slice(grey))
        assert slice_lungs.is_cut_to_lungs(cut)
        again = slice_lungs.find_lungs_in_slice(cut)
        assert (np.where(again, cut, 0) != cut).mean() < 0.03
        _, box = slice_lungs.cut_to_lungs(cut, again)
        assert box == (0, 0, *cut.shape[::-1])


@pytest.mark.parametrize('value', [0, 128, 255])
def test_slices_without_lungs(value):
    assert slice_lungs.find_lungs_in_slice(np.full((64, 80), value, np.uint8)) is None
    noise = np.random.default_rng(0).normal(value, 5, (64, 80)).clip(0, 255).astype(np.uint8)
    assert slice_lungs.find_lungs_in_slice(noise) is None


def test_cut_by_hand():
    grey = np.arange(1, 61, dtype=np.uint8).reshape(6, 10)
    found = np.zeros((6, 10), bool)
    found[2, 3] = found[4, 6] = True
    image, box = slice_lungs.cut_to_lungs(grey, found)
    assert box == (3, 2, 7, 5)
    np.testing.assert_array_equal(image, [[24, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 47]])
    assert image.dtype == np.uint8
    image, box = slice_lungs.cut_to_lungs(grey, found, margin=0.5)  # two pixels, clipped at the bottom
    assert box == (1, 0, 9, 6)
    assert image.shape == (6, 8)
    assert np.count_nonzero(image) == 2
    with pytest.raises(ValueError, match='no lungs'):
        slice_lungs.cut_to_lungs(grey, np.zeros_like(found))
    with pytest.raises(ValueError, match=r'\(6, 10\) and \(6, 9\)'):
        slice_lungs.cut_to_lungs(grey, found[:, 1:])
    with pytest.raises(ValueError, match='-1'):
        slice_lungs.cut_to_lungs(grey, found, margin=-1)


def test_real_cut_slices_stay_as_they_are(real_data):
    paths = sorted((real_data / 'real_slices' / '2A_images').glob('*.png'))[::20]
    for path in paths:
        grey = load_grey(path)
        found = slice_lungs.find_lungs_in_slice(grey)
        assert (np.where(found, grey, 0) != grey).mean() < 0.06, path.name
        _, (xmin, ymin, xmax, ymax) = slice_lungs.cut_to_lungs(grey, found)
        assert max(xmin, ymin, grey.shape[1] - xmax, grey.shape[0] - ymax) <= 2, path.name


def test_real_outlined_slices(real_data):
    """The lungs keep at least 0.97 of the lesions and have at most 1.15 times the outlined area."""
    kept, found_area, outlined_area = [], 0, 0
    for folder, step in ((real_data / 'hospitals' / 'lesions', 5), (real_data / 'lesions', 3)):
        with (folder / 'slices.csv').open() as file:
            rows = list(csv.DictReader(file))[::step]
        for row in rows:
            found = slice_lungs.find_lungs_in_slice(load_grey(folder / row['image']))
            lesion = load_grey(folder / row['lesion']) > 0
            lungs = load_grey(folder / row['lungs']) > 0 if row.get('lungs') else None
            if found is None:
                assert lungs.mean() < 0.02
                continue
            if lesion.any():
                kept.append(found[lesion].mean())
            if lungs is not None:
                found_area += found.sum()
                outlined_area += (lungs | lesion).sum()
    assert len(kept) > 40
    assert np.mean(kept) >= 0.97
    assert found_area <= 1.15 * outlined_area


def test_outside_air_by_hand():
    body = np.zeros((40, 60), np.uint8)
    body[5:30, 5:55] = 200  # air around it touches all corners
    body[10:25, 10:25] = body[10:25, 35:50] = 20  # lungs
    outside = slice_lungs.find_outside_air(body)
    assert outside[0, 0]
    assert outside[:, :5].all()
    assert not outside[6:29, 6:54].any()  # a pixel of skin

    close = np.full((40, 60), 200, np.uint8)
    close[0:20, 0:20] = 20  # a lung in a corner of a closely cropped slice
    close[36:, 5:50] = 20  # air below the table
    outside = slice_lungs.find_outside_air(close)
    assert outside[36:, 5:50].all()
    assert outside.sum() == 4 * 45 + 45 + 2 * 4
    assert not slice_lungs.find_outside_air(np.full((8, 8), 7, np.uint8)).any()


def test_outside_air_in_a_round_field_of_view():
    y, x = np.mgrid[-30:30, -30:30] + 0.5
    image = np.where(np.hypot(y, x) < 30, 100, 0).astype(np.uint8)  # air as grey as the lungs, black around it
    image[15:45, 10:50] = 200
    image[20:40, 15:25] = image[20:40, 35:45] = 100  # lungs
    outside = slice_lungs.find_outside_air(image)
    assert outside[:14].all()
    assert outside[46:].all()
    assert not outside[17:43, 12:48].any()


def test_dark_lungs_by_hand():
    grey = np.full((40, 40), 200, np.uint8)
    grey[:6] = 0  # air outside, in two corners
    grey[10:30, 4:14] = grey[10:30, 26:36] = 30
    grey[18:20, 6:8] = 200  # a vessel
    lesion = np.zeros((40, 40), bool)
    lesion[30:34, 4:14] = True
    lungs = np.zeros((40, 40), bool)
    lungs[10:30, 4:14] = lungs[10:30, 26:36] = True
    np.testing.assert_array_equal(slice_lungs.find_dark_lungs(grey), lungs)
    np.testing.assert_array_equal(slice_lungs.find_dark_lungs(grey, lesion), lungs | lesion)
    assert slice_lungs.find_dark_lungs(np.full((32, 32), 90, np.uint8)) is None
    grey[:, 14:] = 200  # one narrow lung, less than 5 % of the slice
    grey[10:30, 7:14] = 200
    assert slice_lungs.find_dark_lungs(grey) is None
