import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from covidjax.evaluation.localisation import (
    combine_maps,
    compute_localisation,
    create_centre_map,
    upsample_maps,
)

MASK = np.array([[1, 1, 0], [0, 0, 0]], bool)


def test_scores_by_hand():
    attention = np.array([[0.4, 0.1, 0.2], [0.1, 0.2, 0.0]])
    scores = compute_localisation(attention, MASK)
    # Of 2 * 4 pairs, 0.4 wins 4; 0.1 wins against 0.0, ties with 0.1 and loses twice.
    assert scores == pytest.approx({'pointing': 1, 'energy': 0.5, 'auc': 5.5 / 8, 'lesion_share': 1 / 3})


def test_a_map_that_looks_elsewhere():
    scores = compute_localisation(1.0 - MASK, MASK)
    assert scores == {'pointing': 0, 'energy': 0, 'auc': 0, 'lesion_share': 1 / 3}


def test_a_perfect_map():
    scores = compute_localisation(7.0 * MASK, MASK)
    assert scores == {'pointing': 1, 'energy': 1, 'auc': 1, 'lesion_share': 1 / 3}


def test_a_flat_map_is_at_chance():
    scores = compute_localisation(np.full((2, 3), 1 / 6), MASK)
    assert scores == pytest.approx({'pointing': 1 / 3, 'energy': 1 / 3, 'auc': 0.5, 'lesion_share': 1 / 3})


def test_equally_high_pixels_share_the_point():
    attention = np.array([[0.3, 0.0, 0.3], [0.3, 0.0, 0.3]])
    assert compute_localisation(attention, MASK)['pointing'] == 0.25


def test_without_a_lesion_nothing_is_scored():
    scores = compute_localisation(np.ones((2, 3)), np.zeros((2, 3), bool))
    assert scores == {'pointing': None, 'energy': None, 'auc': None, 'lesion_share': 0}


def test_lesion_everywhere():
    scores = compute_localisation(np.ones((2, 3)), np.ones((2, 3), bool))
    assert scores == {'pointing': 1, 'energy': 1, 'auc': None, 'lesion_share': 1}


def test_a_map_of_zeros_has_no_energy():
    scores = compute_localisation(np.zeros((2, 3)), MASK)
    assert scores == pytest.approx({'pointing': 1 / 3, 'energy': None, 'auc': 0.5, 'lesion_share': 1 / 3})


def test_auc_equals_scikit_learns():
    rng = np.random.default_rng(0)
    attention, mask = rng.integers(0, 9, (12, 12)) / 8, rng.random((12, 12)) < 0.3
    assert compute_localisation(attention, mask)['auc'] == pytest.approx(roc_auc_score(mask.ravel(), attention.ravel()))


@pytest.mark.parametrize(
    ('attention', 'message'),
    [
        (np.ones((3, 2)), r'shape \(3, 2\)'),
        (np.full((2, 3), -1.0), 'not negative'),
        (np.full((2, 3), np.nan), 'finite'),
    ],
)
def test_bad_maps(attention, message):
    with pytest.raises(ValueError, match=message):
        compute_localisation(attention, MASK)


def test_maps_are_enlarged_about_half_pixel_centres():
    # The centres of two cells lie at 1 and 3 of four pixels' width; pixel centres at 0.5, 1.5, 2.5, 3.5.
    line = np.array([[[0.0, 1.0], [0.0, 1.0]]])
    np.testing.assert_allclose(upsample_maps(line, 4)[0], [[0, 0.25, 0.75, 1]] * 4, atol=1e-6)


def test_combined_map_is_the_root_of_the_product():
    first, second = np.full((1, 2, 2), 0.25), np.full((1, 4, 4), 0.04)
    np.testing.assert_allclose(combine_maps([first, second], 8), np.full((1, 8, 8), 0.1), rtol=1e-5)


def test_centre_map():
    centre = create_centre_map(9)
    assert np.unravel_index(centre.argmax(), centre.shape) == (4, 4)
    np.testing.assert_allclose(centre, centre[::-1, ::-1])
    np.testing.assert_allclose(centre, centre.T)
    assert centre[4, 0] == pytest.approx(np.exp(-0.5 * (4 / 2.25) ** 2))
