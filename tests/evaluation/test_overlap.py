import numpy as np
import pytest

from covidjax.evaluation import overlap

SCORES = np.array([[0.0, 0.1], [0.4, 0.5]])
LESION = np.array([[False, True], [False, True]])


def test_scores_by_hand():
    assert overlap.compute_pointing(SCORES, LESION) == 1
    assert overlap.compute_pointing(-SCORES, LESION) == 0
    assert overlap.compute_energy(SCORES, LESION) == pytest.approx(0.6)
    # Three of four pairs are ordered correctly; 0.1 is below 0.4.
    assert overlap.compute_rank_auc(SCORES, LESION) == 0.75
    assert overlap.compute_dice(SCORES > 0.3, LESION) == 0.5


@pytest.mark.parametrize('value', [0.0, 0.3])
def test_flat_map_scores_chance(value):
    flat, lesion = np.full((4, 4), value), np.arange(16).reshape(4, 4) < 3
    assert overlap.compute_pointing(flat, lesion) == 3 / 16
    assert overlap.compute_energy(flat, lesion) == pytest.approx(3 / 16)
    assert overlap.compute_rank_auc(flat, lesion) == 0.5


def test_nothing_to_find_is_stated():
    empty = np.zeros((2, 2), bool)
    assert overlap.compute_rank_auc(SCORES, empty) is None
    assert overlap.compute_rank_auc(SCORES, ~empty) is None
    assert overlap.compute_dice(empty, empty) is None
    assert overlap.average_by_patient([None, None], ['a', 'b']) == {'mean': None, 'interval': None, 'number': 0}


def test_mean_is_over_slices_and_interval_over_patients():
    found = overlap.average_by_patient([1, 0, 0, None], ['a', 'b', 'b', 'c'])
    assert found['mean'] == pytest.approx(1 / 3)
    assert found['number'] == 3
    # Resamples are {a, a}: 1, {a, b}: 1/3, {b, b}: 0.
    assert found['interval'] == pytest.approx([0, 1])


def test_weighted_mean_is_a_ratio_of_sums():
    found = overlap.average_by_patient([0.5, 0.25, 1, None], ['a', 'b', 'b', 'b'], weights=[2, 4, 0, 9])
    assert found['mean'] == pytest.approx((1 + 1) / 6)
    assert found['number'] == 3
    assert found['interval'] == pytest.approx([0.25, 0.5])
    assert overlap.average_by_patient([1, 0], ['a', 'b'], weights=[0, 0])['mean'] is None
