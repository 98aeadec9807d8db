import json

import numpy as np
import pytest

from covidjax.data import phantom
from covidjax.data.lungs import LungsFinder, LungsGrid
from covidjax.evaluation import burden

SPACING_MM = (5.0, 2.0, 2.0)  # 0.02 ml a voxel
SHAPE = (12, 40, 40)
RIGHT, LEFT = np.s_[2:11, 10:30, 4:16], np.s_[2:11, 10:30, 22:34]  # boxes of 9 x 20 x 12 voxels, 43.2 ml each


def make_scan(*, spacing=SPACING_MM, repeat=(1, 1, 1)):
    """Returns probabilities and the grid of two boxes of lungs with lesions in the right one, outside and in the table.

    The cells of the model, of the grid and the voxels are the same unless voxels are repeated.
    """
    probabilities = np.zeros((*SHAPE, 3), np.float16)
    lungs = np.zeros(SHAPE, bool)
    lungs[RIGHT] = lungs[LEFT] = True
    probabilities[lungs, 0] = 1
    hu = np.where(lungs, -850, 40).astype(np.float16)
    lesion = np.zeros(SHAPE, bool)
    lesion[3:5, 10:20, 4:10] = True  # 2 x 10 x 6 voxels in the upper third: 2.4 ml, half of it consolidated
    lesion[9, 10:15, 22:26] = True  # 20 voxels in the lower third of the left lung: 0.4 ml
    lesion[0, 30:40] = True  # 400 voxels outside, 8 ml
    probabilities[lesion, 1] = 0.375
    probabilities[3, :, :, 2] = 0.5
    hu[3:5, 10:20, 4:10], hu[9, 10:15, 22:26] = -100, -500
    for axis, times in enumerate(repeat):
        lungs, hu = lungs.repeat(times, axis), hu.repeat(times, axis)
    probabilities = probabilities.repeat(repeat[0], 0)
    return probabilities, LungsGrid(hu, lungs, (1, 1, 1), spacing, hu.shape)


def check_amounts(found):
    assert found.whole == pytest.approx((86.4, 2.8, 1.2, 100 * 2.8 / 86.4, 100 * 1.2 / 86.4))
    assert found.sides['right'] == pytest.approx((43.2, 2.4, 1.2, 100 * 2.4 / 43.2, 100 * 1.2 / 43.2))
    assert found.sides['left'] == pytest.approx((43.2, 0.4, 0, 100 * 0.4 / 43.2, 0))
    assert found.thirds['upper'] == pytest.approx((28.8, 2.4, 1.2, 100 * 2.4 / 28.8, 100 * 1.2 / 28.8))
    assert found.thirds['middle'] == pytest.approx((28.8, 0, 0, 0, 0))
    assert found.thirds['lower'] == pytest.approx((28.8, 0.4, 0, 100 * 0.4 / 28.8, 0))
    assert found.lesions_hu == pytest.approx((2.4 * -100 + 0.4 * -500) / 2.8, rel=1e-3)


def test_boxes_by_hand():
    probabilities, grid = make_scan()
    found = burden.measure_burden(probabilities, grid, 5.0 * np.arange(12), threshold=0.37)
    assert found.is_from_hu
    check_amounts(found)
    assert found.infected == [4, 5, 10]
    assert found.slices[3] == pytest.approx((4, 480 * 0.04, 60 * 0.04, 30.0, 12.5, True, 60 * 0.375 / 480, 0.375))
    assert found.slices[0] == burden.SliceBurden(1, 0, 0, 0, 0, False, 0, 0)
    assert found.grade == 1
    np.testing.assert_array_equal(found.lungs_txGxV, grid.lungs_txhxw)
    assert burden.measure_burden(probabilities, grid, threshold=0.38).whole.lesions_ml == 0
    assert burden.measure_burden(probabilities, grid, threshold=0.38).grade == 0
    in_json = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (in_json['lesions_ml'], in_json['num_infected']) == (pytest.approx(2.8), 3)
    assert in_json['sides']['left']['lesions_percent'] == pytest.approx(100 * 0.4 / 43.2)
    assert in_json['grade_says'] == 'up to 25 %'


def test_finer_voxels_and_incomplete_cells_give_the_same_volumes():
    probabilities, grid = make_scan(spacing=(2.5, 1.0, 1.0), repeat=(2, 2, 2))

    def pick(voxels):
        """Returns the middle of blocks of 2 x 3 x 3 voxels; the last blocks of 80 = 26 * 3 + 2 are incomplete."""
        return np.pad(voxels, ((0, 0), (0, 1), (0, 1)))[::2, 1::3, 1::3]

    hu, lungs = pick(grid.hu_txhxw), pick(grid.lungs_txhxw)
    coarse = LungsGrid(hu, lungs, (2, 3, 3), (2.5, 1.0, 1.0), grid.shape)
    found = burden.measure_burden(probabilities, coarse, threshold=0.2)
    assert found.whole.lungs_ml == pytest.approx(86.4, rel=0.05)
    assert found.whole.lesions_ml == pytest.approx(2.8, rel=0.2)
    assert len(found.slices) == 24
    assert found.infected == [7, 8, 9, 10, 19, 20]


def test_missing_slices_are_filled_by_their_neighbours():
    probabilities, grid = make_scan()
    kept = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    thin = grid._replace(hu_txhxw=grid.hu_txhxw[kept], lungs_txhxw=grid.lungs_txhxw[kept], shape=(11, 40, 40))
    found = burden.measure_burden(probabilities[kept], thin, 5.0 * np.array(kept), threshold=0.37)
    assert found.whole.lungs_ml == pytest.approx(86.4)
    assert found.whole.lesions_ml == pytest.approx(0.4 + 1.5 * 1.2)


def test_lesions_outside_the_lungs_do_not_count_and_are_told():
    probabilities, grid = make_scan(spacing=(10.0, 2.0, 2.0))
    remarks = burden.measure_burden(probabilities, grid, threshold=0.37).remarks
    assert remarks[-1] == '16 ml of what the model calls lesions lies outside the lungs and is not counted'
    # Less than 10 ml are not worth a remark.
    near = burden.measure_burden(*make_scan(), threshold=0.37)
    assert not any('outside' in remark for remark in near.remarks)


def test_without_hounsfield_units_there_are_shares_only():
    probabilities, _ = make_scan()
    found = burden.measure_burden(probabilities, None, threshold=0.2)
    assert not found.is_from_hu
    assert found.describe_lungs() == 'by the model alone'
    assert (found.whole.lungs_ml, found.whole.lesions_ml, found.lesions_hu) == (None, None, None)
    assert found.whole.lesions_percent == pytest.approx(100 * 2.8 / 86.4, rel=0.05)
    assert found.sides['right'].lesions_percent == pytest.approx(100 * 2.4 / 43.2, rel=0.05)
    assert found.sides['left'].lesions_percent == pytest.approx(100 * 0.4 / 43.2, rel=0.1)
    assert found.slices[3].lungs_cm2 is None
    assert found.slices[3].lungs_percent == pytest.approx(30, rel=0.02)
    assert found.infected == [4, 5, 10]
    assert found.remarks[0].startswith('no Hounsfield units')
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ('share', 'grade'), [(0.0, 0), (0.004, 0), (0.2, 1), (0.25, 1), (0.3, 2), (0.5, 2), (0.7, 3), (0.8, 4), (1.0, 4)]
)
def test_grade_is_by_share(share, grade):
    probabilities, grid = make_scan()
    probabilities[..., 1] = 0
    places = np.argwhere(grid.lungs_txhxw[2])
    for row, column in places[: round(share * len(places))]:
        probabilities[2:11, row, column, 1] = 1
    found = burden.measure_burden(probabilities, grid, threshold=0.5)
    assert found.whole.lesions_percent == pytest.approx(100 * round(share * 480) / 480)
    assert found.grade == grade


def test_nothing_found_is_said():
    probabilities, grid = make_scan()
    nothing = burden.measure_burden(
        probabilities * 0, grid._replace(lungs_txhxw=grid.lungs_txhxw * False), threshold=0.4
    )
    assert (nothing.whole.lungs_ml, nothing.whole.lesions_percent, nothing.grade) == (0, None, None)
    assert nothing.remarks == ['no lungs found: nothing is measured']
    assert nothing.infected == []
    json.dumps(nothing.to_json(), allow_nan=False)
    # Without lungs from Hounsfield units, those of the model serve, with volumes.
    by_model = burden.measure_burden(probabilities, grid._replace(lungs_txhxw=grid.lungs_txhxw & False), threshold=0.37)
    check_amounts(by_model)
    assert by_model.remarks[0].startswith('no lungs found from Hounsfield units')


def test_remarks_on_lungs():
    probabilities, grid = make_scan()
    small = burden.measure_burden(probabilities, grid, threshold=0.37).remarks
    assert small == ['lungs of 86 ml are implausible for an adult: check spacing and outlines']
    large = grid._replace(spacing_mm=(20.0, 4.0, 4.0))
    assert burden.measure_burden(probabilities, large, threshold=0.38).remarks == []
    cut = large._replace(lungs_txhxw=large.lungs_txhxw[2:11], hu_txhxw=large.hu_txhxw[2:11], shape=(9, 40, 40))
    assert burden.measure_burden(probabilities[2:11], cut, threshold=0.38).remarks == [
        'the lungs are cut off at the first and the last slice: part of them is not measured'
    ]
    moved = np.roll(probabilities, 8, 1)
    [remark] = burden.measure_burden(moved, large, threshold=0.38).remarks
    assert 'disagree on the lungs (Dice 0.6' in remark


def test_one_lung_is_not_cut_in_two():
    probabilities, grid = make_scan()
    alone = grid.lungs_txhxw.copy()
    alone[LEFT] = False
    probabilities[LEFT] = 0
    found = burden.measure_burden(probabilities, grid._replace(lungs_txhxw=alone), threshold=0.37)
    assert found.sides['right'].lungs_ml == pytest.approx(43.2)
    assert found.sides['left'] == (0, 0, 0, None, None)


def test_slices_must_match_the_grid():
    probabilities, grid = make_scan()
    with pytest.raises(ValueError, match='11 slices, and a grid of 12'):
        burden.measure_burden(probabilities[1:], grid, threshold=0.37)


@pytest.fixture(scope='module')
def sick():
    """Returns a phantom as a scan of 2 mm voxels: its grid, the lesion cells, and a perfect model's probabilities."""
    spacing = (8.0, 3.0, 3.0)
    healthy, hu = (phantom.render_volume(32, 112, label, seed=3) for label in (0, 2))
    lesion = hu - healthy.astype(int) > 150
    grids = []
    for scan in (healthy, hu):
        finder = LungsFinder(scan.shape, spacing)
        for plane in scan:
            finder.add(plane)
        grids.append(finder.find())
    probabilities = np.zeros((*hu.shape, 3), np.float16)
    probabilities[..., 0], probabilities[..., 1] = grids[0].lungs_txhxw, lesion
    return grids, lesion, probabilities


def test_phantom_by_a_perfect_model(sick):
    (healthy, grid), lesion, probabilities = sick
    found = burden.measure_burden(probabilities, grid, threshold=0.5)
    inside = (lesion & healthy.lungs_txhxw).sum() * 0.072
    assert inside > 20
    assert found.whole.lesions_ml == pytest.approx(inside, rel=0.05)
    assert found.whole.lungs_ml == pytest.approx(healthy.lungs_txhxw.sum() * 0.072, rel=0.03)
    shows = [bool(slice_lesion.sum() > 20) for slice_lesion in lesion & healthy.lungs_txhxw]
    agree = [s.is_infected == shown for s, shown in zip(found.slices, shows, strict=True)]
    assert np.mean(agree) > 0.9
    clean = burden.measure_burden(probabilities * np.array([1, 0, 0], np.float16), healthy, threshold=0.5)
    assert (clean.whole.lesions_ml, clean.grade, clean.infected) == (0, 0, [])
