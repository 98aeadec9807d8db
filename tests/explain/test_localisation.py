import numpy as np
import pytest

from covidjax.data.lesions import LesionSlice
from covidjax.explain import localisation

SCORES = np.array([[0.0, 0.1], [0.4, 0.5]])
LESION = np.array([[False, True], [False, True]])


def test_scores_by_hand():
    assert localisation.compute_pointing(SCORES, LESION) == 1
    assert localisation.compute_pointing(-SCORES, LESION) == 0
    assert localisation.compute_energy(SCORES, LESION) == pytest.approx(0.6)
    # Three of four pairs are ordered correctly; 0.1 is below 0.4.
    assert localisation.compute_rank_auc(SCORES, LESION) == 0.75
    assert localisation.compute_dice(SCORES > 0.3, LESION) == 0.5


@pytest.mark.parametrize('value', [0.0, 0.3])
def test_flat_map_scores_chance(value):
    flat, lesion = np.full((4, 4), value), np.arange(16).reshape(4, 4) < 3
    assert localisation.compute_pointing(flat, lesion) == 3 / 16
    assert localisation.compute_energy(flat, lesion) == pytest.approx(3 / 16)
    assert localisation.compute_rank_auc(flat, lesion) == 0.5


def test_nothing_to_find_is_stated():
    empty = np.zeros((2, 2), bool)
    assert localisation.compute_rank_auc(SCORES, empty) is None
    assert localisation.compute_rank_auc(SCORES, ~empty) is None
    assert localisation.compute_dice(empty, empty) is None
    assert localisation.average_by_patient([None, None], ['a', 'b']) == {'mean': None, 'interval': None, 'number': 0}


def test_perfect_inverted_and_centre_maps():
    lesion = np.zeros((32, 32), bool)
    lesion[14:18, 14:18] = True
    slices = [LesionSlice('a', 'a', 2, np.zeros((32, 32, 1), np.uint8), lesion, None)]

    def score(scores):
        found = localisation.score_maps(scores[None], scores[None] > 0.5, slices)
        return {name: value['mean'] for name, value in found.items()}

    assert score(lesion.astype(float)) == {
        'pointing': 1,
        'energy_lesion': 1,
        'energy_lung': None,
        'auc': 1,
        'dice': 1,
    }
    inverted = score(1.0 - lesion)
    assert (inverted['pointing'], inverted['energy_lesion'], inverted['auc'], inverted['dice']) == (0, 0, 0, 0)
    assert score(localisation.create_centre_map(32))['auc'] > 0.99


def test_mean_is_over_slices_and_interval_over_patients():
    found = localisation.average_by_patient([1, 0, 0, None], ['a', 'b', 'b', 'c'])
    assert found['mean'] == pytest.approx(1 / 3)
    assert found['number'] == 3
    # Resamples are {a, a}: 1, {a, b}: 1/3, {b, b}: 0.
    assert found['interval'] == pytest.approx([0, 1])


def test_slice_attention_by_hand():
    attention = [np.array([0.1, 0.6, 0.2, 0.1]), np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.5, 0.5])]
    shows = [np.array([0, 1, 0, 0], bool), np.array([0, 1, 0, 0], bool), np.array([1, 1], bool)]
    found = {name: value['mean'] for name, value in localisation.score_slice_attention(attention, shows).items()}
    assert found['auc'] == pytest.approx((1 + 1 / 3) / 2)  # in the second scan the slice ties with two and is below one
    assert found['hit@1'] == 0.5
    assert found['chance@1'] == pytest.approx(1 / 4)
    assert found['hit@3'] == 1
    assert found['chance@3'] == pytest.approx(3 / 4)
