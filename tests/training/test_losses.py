import numpy as np
import pytest

from covidjax.training.losses import compute_class_weights, weighted_cross_entropy


def test_weights_of_the_papers_training_data():
    # Table I: 35,996 / 25,496 / 82,286.
    assert compute_class_weights([35_996, 25_496, 82_286]) == pytest.approx((0.70830, 1.0, 0.30985), abs=1e-5)


def test_weights_need_two_classes():
    assert compute_class_weights([5, 0, 3]) == (3 / 5, 0, 1)
    with pytest.raises(ValueError, match=r'\[5, 0, 0\]'):
        compute_class_weights([5, 0, 0])


def test_loss_by_hand():
    # Uniform logits: -log(1/3) each. Logits (ln 2, 0, 0): p = (1/2, 1/4, 1/4).
    logits = np.array([[0, 0, 0], [np.log(2), 0, 0], [np.log(2), 0, 0]])
    losses, weights = weighted_cross_entropy(logits, np.array([2, 0, 1]), (0.5, 1.0, 0.25))
    np.testing.assert_allclose(weights, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(losses, [0.25 * np.log(3), 0.5 * np.log(2), np.log(4)], rtol=1e-6)


def test_loss_of_large_logits_is_finite():
    losses, _ = weighted_cross_entropy(np.array([[1e4, 0.0, -1e4]]), np.array([2]), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(losses, [2e4])


def test_label_smoothing_by_hand():
    # p = (1/2, 1/4, 1/4): -log p = (ln 2, ln 4, ln 4).
    logits = np.array([[np.log(2), 0, 0]])
    losses, _ = weighted_cross_entropy(logits, np.array([0]), (0.5, 1.0, 1.0), 0.3)
    expected = 0.5 * (0.7 * np.log(2) + 0.3 * (np.log(2) + 2 * np.log(4)) / 3)
    np.testing.assert_allclose(losses, [expected], rtol=1e-6)
    # A class without examples (weight 0) is not smoothed toward.
    losses, _ = weighted_cross_entropy(logits, np.array([0]), (0.5, 0.0, 1.0), 0.3)
    np.testing.assert_allclose(losses, [0.5 * (0.7 * np.log(2) + 0.3 * (np.log(2) + np.log(4)) / 2)], rtol=1e-6)
