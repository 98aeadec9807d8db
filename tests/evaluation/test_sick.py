import numpy as np
import pytest

from covidjax.errors import UserError
from covidjax.evaluation import sick


def test_areas_count_positions():
    probabilities = np.zeros((1, 2, 3, 3))
    probabilities[0, 0, :, 0] = 0.9  # three positions of lungs
    probabilities[0, 0, 0, 1] = 0.4
    probabilities[0, 1, 0, 1] = 0.3  # a lesion that the model does not call lungs
    probabilities[0, 1, 2, 1] = 0.29  # neither lungs nor lesion
    found = sick.find_in_slices(probabilities, 0.3)
    assert [values[0] for values in found] == [4, 2, 0.4]
    assert sick.find_in_slices(np.zeros((1, 2, 3, 3)), 0.3).peaks[0] == 0


def test_features_by_hand():
    lungs = np.array([0, 100, 100, 100, 100, 100, 50, 50, 50, 50, 100])
    lesions = np.array([0, 0, 10, 0, 0, 0, 20, 10, 0, 0, 0])
    peaks = np.array([0, 0.4, 0.5, 0, 0, 0, 0.8, 0.7, 0, 0, 0])
    # Ten slices show lungs; the two worst have 40 % and 20 %, and peaks of 0.8 and 0.7.
    np.testing.assert_allclose(sick.compute_features(sick.Found(lungs, lesions, peaks)), [40 / 800, 0.3, 0.75])
    one = sick.Found(np.array([50]), np.array([5]), np.array([0.6]))
    np.testing.assert_allclose(sick.compute_features(one), [0.1, 0.1, 0.6])
    np.testing.assert_array_equal(sick.compute_features(sick.Found(*np.zeros((3, 3)))), [0, 0, 0])


def test_rule_orders_scans_by_their_lesions():
    rng = np.random.default_rng(0)
    healthy, ill = rng.uniform(0, 0.004, (40, 1)), rng.uniform(0.002, 0.3, (60, 1))
    features = np.repeat(np.concatenate([healthy, ill]), 3, axis=1)
    is_sick = np.arange(100) >= 40
    rule = sick.fit_sick(features, is_sick)
    p = sick.compute_sick(rule, features)
    assert (np.argsort(p) == np.argsort(features[:, 0])).all()
    assert ((p > 0.5) == is_sick).mean() > 0.9
    assert sick.compute_sick(rule, np.zeros((1, 3)))[0] < 0.2
    sure = sick.compute_sick(sick.SickRule((3.0, 3.0, 0.0), 40.0), np.array([[0, 0, 0], [1, 1, 1]]))
    assert np.isfinite(sick.join_logits(sure, np.zeros((2, 3)))).all()


def test_lesions_below_the_threshold_count():
    peaks = np.repeat([0.05, 0.4], 20)
    features = np.column_stack([np.zeros((40, 2)), peaks])
    p = sick.compute_sick(sick.fit_sick(features, peaks > 0.1), features)
    assert ((p > 0.5) == (peaks > 0.1)).all()


def test_rule_of_an_earlier_version_is_refused():
    rule = sick.SickRule((1.0, 2.0, 3.0), 0.5)
    assert sick.parse_rule({'lesions': 'box', 'weights': [1.0, 2.0, 3.0], 'bias': 0.5}) == rule
    with pytest.raises(UserError, match='evaluate'):
        sick.parse_rule({'weights': [1.0, 2.0], 'bias': 0.5})


def test_rule_needs_both_kinds():
    with pytest.raises(ValueError, match='sick and normal'):
        sick.fit_sick(np.zeros((2, 3)), np.array([True, True]))


def test_joined_probabilities_by_hand():
    joined = sick.join(np.array([0.9]), np.array([[0.8, 0.15, 0.05]]))
    np.testing.assert_allclose(joined, [[0.1, 0.9 * 0.75, 0.9 * 0.25]], atol=1e-5)


def test_disagreement_is_told():
    assert sick.describe_disagreement([0.1, 0.2, 0.7], [0.2, 0.3, 0.5]) == ''
    assert 'show no disease' in sick.describe_disagreement([0.9, 0.05, 0.05], [0.2, 0.3, 0.5])
    assert 'show disease' in sick.describe_disagreement([0.1, 0.2, 0.7], [0.8, 0.1, 0.1])
