import numpy as np
import pytest

from covidjax.evaluation import sick


def test_areas_count_positions():
    probabilities = np.zeros((1, 2, 3, 3))
    probabilities[0, 0, :, 0] = 0.9  # three positions of lungs
    probabilities[0, 0, 0, 1] = 0.4
    probabilities[0, 1, 0, 1] = 0.3  # a lesion that the model does not call lungs
    lungs, lesions = sick.count_areas(probabilities, 0.3)
    assert (lungs[0], lesions[0]) == (4, 2)


def test_features_by_hand():
    lungs = np.array([0, 100, 100, 100, 100, 100, 50, 50, 50, 50, 100])
    lesions = np.array([0, 0, 10, 0, 0, 0, 20, 10, 0, 0, 0])
    # Ten slices show lungs; the two worst have 40 % and 20 %.
    np.testing.assert_allclose(sick.compute_features(lungs, lesions), [40 / 800, 0.3])
    np.testing.assert_allclose(sick.compute_features(np.array([50]), np.array([5])), [0.1, 0.1])
    np.testing.assert_array_equal(sick.compute_features(np.zeros(3), np.zeros(3)), [0, 0])


def test_rule_orders_scans_by_their_lesions():
    rng = np.random.default_rng(0)
    healthy, ill = rng.uniform(0, 0.004, (40, 1)), rng.uniform(0.002, 0.3, (60, 1))
    features = np.repeat(np.concatenate([healthy, ill]), 2, axis=1)
    is_sick = np.arange(100) >= 40
    rule = sick.fit_sick(features, is_sick)
    p = sick.compute_sick(rule, features)
    assert (np.argsort(p) == np.argsort(features[:, 0])).all()
    assert ((p > 0.5) == is_sick).mean() > 0.9
    assert sick.compute_sick(rule, np.zeros((1, 2)))[0] < 0.2
    sure = sick.compute_sick(sick.SickRule((3.0, 3.0), 40.0), np.array([[0, 0], [1, 1]]))
    assert np.isfinite(sick.join_logits(sure, np.zeros((2, 3)))).all()


def test_rule_needs_both_kinds():
    with pytest.raises(ValueError, match='sick and normal'):
        sick.fit_sick(np.zeros((2, 2)), np.array([True, True]))


def test_joined_probabilities_by_hand():
    joined = sick.join(np.array([0.9]), np.array([[0.8, 0.15, 0.05]]))
    np.testing.assert_allclose(joined, [[0.1, 0.9 * 0.75, 0.9 * 0.25]], atol=1e-5)


def test_disagreement_is_told():
    assert sick.describe_disagreement([0.1, 0.2, 0.7], [0.2, 0.3, 0.5]) == ''
    assert 'show no disease' in sick.describe_disagreement([0.9, 0.05, 0.05], [0.2, 0.3, 0.5])
    assert 'show disease' in sick.describe_disagreement([0.1, 0.2, 0.7], [0.8, 0.1, 0.1])
