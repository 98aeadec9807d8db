import csv

import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from covidjax.data import lungs

SPACING_MM = (5.0, 2.5, 2.5)
SHAPE = (40, 128, 160)


def ellipsoid(centre, radii):
    axes = np.ogrid[tuple(slice(size) for size in SHAPE)]
    return sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) < 1


def add_noise(hu, seed=0):
    return (hu + np.random.default_rng(seed).normal(0, 30, hu.shape)).astype(np.int16)


@pytest.fixture(scope='module')
def chest():
    """Returns Hounsfield units of a chest on a table, and masks of its parts."""
    hu = np.full(SHAPE, -1000.0)
    hu[ellipsoid((20, 64, 80), (500, 50, 68))] = 40
    hu[:, [117, 125], 20:140] = hu[:, 117:126, 20] = hu[:, 117:126, 139] = 100  # a hollow table
    hu[:, 118:125, 21:139] = -930
    sides = [ellipsoid((18, 60, x), (16, 32, 22)) for x in (48, 112)]
    parts = {'lungs': sides[0] | sides[1], 'right': sides[0], 'table': np.zeros(SHAPE, bool)}
    parts['table'][:, 117:126, 20:140] = True
    hu[parts['lungs']] = -850
    parts['trachea'] = ellipsoid((0, 45, 80), (20, 4, 4)) | ellipsoid((10, 45, 80), (11, 4, 4))
    parts['bowel'] = ellipsoid((37, 35, 105), (3, 10, 14))
    hu[parts['trachea'] | parts['bowel']] = -1000
    rows, columns = np.ogrid[: SHAPE[1], : SHAPE[2]]
    place = np.arange(SHAPE[0])[:, np.newaxis, np.newaxis]
    parts['consolidation'] = sides[0] & (abs(place - 18) < 4) & (abs(rows - 60) < 5) & (columns < 36)  # 22 mm wide
    hu[parts['consolidation']] = 40
    return add_noise(hu), parts


def overlap(found, expected):
    return (found & expected).sum() / (found | expected).sum()


def test_lungs_with_lesions_and_nothing_else(chest):
    hu, parts = chest
    before = hu.copy()
    found = lungs.find_lungs_in_scan(hu, SPACING_MM)
    assert found.dtype == bool
    assert found.shape == hu.shape
    np.testing.assert_array_equal(hu, before)
    np.testing.assert_array_equal(found, lungs.find_lungs_in_scan(hu, SPACING_MM))
    assert (found & parts['consolidation']).sum() > 0.85 * parts['consolidation'].sum()
    for name in ('trachea', 'bowel', 'table'):
        assert not (found & parts[name]).any(), name
    assert abs(found.sum() / parts['lungs'].sum() - 1) < 0.03
    assert overlap(found, parts['lungs']) > 0.95


@pytest.mark.parametrize(
    ('view', 'spacing'),
    [
        (np.s_[::-1], SPACING_MM),
        (np.s_[:, ::-1], SPACING_MM),  # prone, with the table in front
        (np.s_[::2], (10.0, 2.5, 2.5)),
        (np.s_[[*range(12), *range(16, 30), *range(33, 40)]], SPACING_MM),  # slices missing
        (np.s_[18:19], SPACING_MM),
        (np.s_[10:26], SPACING_MM),  # lungs in the first and the last slice
        (np.s_[:, :, 38:], SPACING_MM),  # the field of view cuts the right lung
        (np.s_[:, 20:100, 30:128], SPACING_MM),
    ],
)
def test_views_of_the_same_chest(chest, view, spacing):
    hu, parts = chest
    found = lungs.find_lungs_in_scan(hu[view], spacing)
    assert overlap(found, parts['lungs'][view]) > 0.93
    assert not (found & parts['trachea'][view]).any()


def test_circular_field_of_view_through_the_lungs(chest):
    hu, parts = chest
    rows, columns = np.ogrid[: SHAPE[1], : SHAPE[2]]
    outside = (rows - 64) ** 2 + (columns - 80) ** 2 > 48**2
    expected = parts['lungs'] & ~outside
    for padding in (-1024, -2000):
        found = lungs.find_lungs_in_scan(np.where(outside, np.int16(padding), hu), SPACING_MM)
        assert (found & expected).sum() > 0.95 * expected.sum()
        assert (found & ~outside & ~expected).sum() < 0.1 * expected.sum()


def test_thin_slices_and_small_pixels_go_through_a_coarse_grid(chest):
    hu, parts = chest
    fine = hu[5:30].repeat(2, 0).repeat(3, 1).repeat(3, 2)[:, :-1, :-2]
    expected = parts['lungs'][5:30].repeat(2, 0).repeat(3, 1).repeat(3, 2)[:, :-1, :-2]
    for values in (fine, fine.astype(np.float32)):
        found = lungs.find_lungs_in_scan(values, (2.5, 2.5 / 3, 2.5 / 3))
        assert overlap(found, expected) > 0.93


def test_lungs_that_touch_are_closed_apart(chest):
    hu, parts = chest
    bridge = ellipsoid((18, 40, 80), (6, 2, 14)) & ~parts['trachea']
    joined = hu.copy()
    joined[bridge] = -850
    found = lungs.find_lungs_in_scan(joined, SPACING_MM)
    assert overlap(found, parts['lungs'] | bridge) > 0.93
    assert not found[18, 55:65, 78:82].any()  # between the lungs, away from the bridge


def test_enclosed_lesion_is_filled_and_the_liver_is_not(chest):
    hu, parts = chest
    lesion = ellipsoid((18, 60, 112), (5, 12, 12))  # 60 mm wide: the disc alone does not close it
    liver = ellipsoid((40, 60, 48), (14, 12, 12))  # from below into the other lung
    changed = hu.copy()
    changed[lesion | liver] = 40
    found = lungs.find_lungs_in_scan(changed, SPACING_MM)
    assert found[lesion].all()
    assert found[30, 60, 48] == 0
    assert parts['lungs'][30, 60, 48]


def test_bowel_without_lungs_is_not_taken(chest):
    hu, parts = chest
    below = hu[35:].copy()
    below[parts['lungs'][35:]] = 40
    assert not lungs.find_lungs_in_scan(below, SPACING_MM).any()
    assert not lungs.find_lungs_in_scan(below[2:3], SPACING_MM).any()


@pytest.mark.parametrize('value', [-3024, -1000, -850, 40, 3071])
def test_scans_without_lungs(value):
    for hu in (np.full((5, 40, 50), value, np.int16), add_noise(np.full((5, 40, 50), float(value)))):
        assert not lungs.find_lungs_in_scan(hu, (5.0, 5.0, 5.0)).any()
        assert not lungs.find_lungs_in_scan(hu[:1], (5.0, 5.0, 5.0)).any()


def test_what_is_no_scan():
    with pytest.raises(ValueError, match=r'\(4, 5\)'):
        lungs.find_lungs_in_scan(np.zeros((4, 5), np.int16), SPACING_MM)
    with pytest.raises(ValueError, match=r'\(0, 5, 5\)'):
        lungs.find_lungs_in_scan(np.zeros((0, 5, 5), np.int16), SPACING_MM)
    with pytest.raises(ValueError, match='spacing'):
        lungs.find_lungs_in_scan(np.zeros((3, 5, 5), np.int16), (0.0, 1.0, 1.0))


def load_grey(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('L'))


def test_real_outlined_slices(real_data):
    folder = real_data / 'hospitals' / 'lesions'
    with (folder / 'slices.csv').open() as file:
        rows = [row for row in csv.DictReader(file) if row['source'] == 'Radiopaedia']
    recall, precision, kept = [], [], []
    for patient in sorted({row['patient'] for row in rows}):
        grey, lesion, expected = (
            np.stack([load_grey(folder / row[kind]) for row in rows if row['patient'] == patient])
            for kind in ('image', 'lesion', 'lungs')
        )
        # The window is in the README of the data; the slice thickness is a guess.
        hu = np.round(grey * (1500 / 255) - 1350).astype(np.int16)
        found = lungs.find_lungs_in_scan(hu, (4.0, 1.0, 1.0))
        recall.append(found[expected >= 128].mean())
        precision.append((expected >= 128)[found].mean())
        kept.append(found[lesion >= 128].mean())
    assert min(recall) > 0.97
    assert min(precision) > 0.92
    assert min(kept) > 0.93


@pytest.fixture(scope='module')
def consolidated(chest):
    """Returns the grid of a chest with dense lesions at the wall that no disc closes, and masks of its parts."""
    hu, parts = chest
    rows, columns = np.ogrid[: SHAPE[1], : SHAPE[2]]
    place = np.arange(SHAPE[0])[:, np.newaxis, np.newaxis]
    wide = parts['right'] & (abs(place - 18) < 5) & (abs(rows - 60) < 16) & (columns < 40)  # 80 mm wide, 35 mm deep
    thin = ellipsoid((18, 60, 112), (16, 32, 22)) & ~ellipsoid((18, 60, 111), (40, 31, 20)) & (abs(place - 18) < 5)
    stomach = ellipsoid((40, 60, 112), (6, 16, 16))
    changed = hu.copy()
    changed[wide | thin] = 40
    changed[stomach & (rows < 50)] = -1000  # gas above food
    finder = lungs.LungsFinder(SHAPE, SPACING_MM)
    for plane in changed:
        finder.add(plane)
    grid = finder.find()
    assert grid.steps == (1, 1, 1)
    return grid, parts | {'wide': wide, 'thin': thin, 'stomach': stomach}


def test_a_model_adds_dense_lesions_at_the_wall(consolidated):
    grid, parts = consolidated
    found = grid.lungs_txhxw
    assert (found & parts['wide']).sum() < 0.7 * parts['wide'].sum()
    called = parts['lungs'] | parts['bowel'] | parts['table'] | parts['trachea']
    none = np.zeros(SHAPE, bool)
    enlarged = lungs.enlarge_lungs(grid, called, none)
    assert (enlarged & parts['wide']).sum() > 0.95 * parts['wide'].sum()
    for name in ('bowel', 'table', 'trachea'):
        assert not (enlarged & parts[name]).any(), name
    assert overlap(enlarged, parts['lungs']) > overlap(found, parts['lungs'])
    assert not (enlarged & ~found & ~parts['lungs']).any()
    np.testing.assert_array_equal(found, grid.lungs_txhxw)  # unchanged
    np.testing.assert_array_equal(lungs.enlarge_lungs(grid, none, none), found)


def test_thin_additions_need_a_lesion(consolidated):
    grid, parts = consolidated
    rim = np.zeros(SHAPE, bool)
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        rim |= np.roll(grid.lungs_txhxw, shift, (1, 2)) & ~grid.lungs_txhxw
    assert not (lungs.enlarge_lungs(grid, grid.lungs_txhxw | rim, rim & False) & rim).any()
    enlarged = lungs.enlarge_lungs(grid, parts['lungs'], parts['thin'])
    missed = parts['thin'] & ~grid.lungs_txhxw
    assert missed.sum() > 100
    assert (enlarged & missed).sum() > 0.9 * missed.sum()


def test_what_a_model_calls_lungs_far_from_them_stays_outside(consolidated):
    grid, parts = consolidated
    everything = np.ones(SHAPE, bool)
    enlarged = lungs.enlarge_lungs(grid, everything, everything)
    distance = scipy.ndimage.distance_transform_edt(~grid.lungs_txhxw, SPACING_MM)
    assert distance[enlarged].max() < 45
    gas = grid.hu_txhxw < -900
    assert not (enlarged & gas & (parts['stomach'] | parts['table'] | parts['bowel'])).any()
    # A model that is wrong about the stomach, below the lungs, adds no more than its upper edge.
    enlarged = lungs.enlarge_lungs(grid, grid.lungs_txhxw | parts['stomach'], parts['stomach'])
    assert (enlarged & parts['stomach']).sum() < 0.5 * parts['stomach'].sum()


def test_nothing_is_added_in_slices_without_lungs(consolidated):
    grid, _ = consolidated
    apex = grid.lungs_txhxw.any((1, 2)).argmax()
    assert apex > 1
    above = np.zeros(SHAPE, bool)
    above[:apex] = grid.lungs_txhxw.any(0)  # right above the lungs, as a model may call the shoulders
    enlarged = lungs.enlarge_lungs(grid, grid.lungs_txhxw | above, above)
    np.testing.assert_array_equal(enlarged, grid.lungs_txhxw)
