import jax
import numpy as np
import pytest

from covidjax.training.losses import (
    add_attention_loss,
    compute_attention_losses,
    compute_class_weights,
    compute_mask_losses,
    create_cross_entropy,
    create_mask_objective,
    score_masks,
    weighted_cross_entropy,
)


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


def test_mask_loss_by_hand():
    # Two positions. Lungs: p = 3/4 and 1/4 where the first is outlined. Lesion: nothing is outlined, p = 1/2.
    logits = np.array([[[[np.log(3), 0, 5], [-np.log(3), 0, 5]]]])
    targets = np.array([[[[1.0, 0, 0], [0, 0, 0]]]])
    lungs = 3 * -np.log(3 / 4) + 1 - 2 * 0.75 / (1 + 1)
    lesion = 3 * np.log(2)
    known = np.array([[1, 1, 0]])
    np.testing.assert_allclose(compute_mask_losses(logits, targets, known), [lungs + lesion], rtol=1e-5)
    np.testing.assert_allclose(compute_mask_losses(logits, targets, np.array([[1, 0, 0]])), [lungs], rtol=1e-5)
    # Without lesions there is nothing to divide into ground glass and consolidation.
    np.testing.assert_allclose(compute_mask_losses(logits, targets, np.array([[0, 0, 1]])), [0], atol=1e-6)


def test_consolidation_is_scored_within_the_lesion():
    # Half of the first position is lesion, all of it consolidation; p = 1/2 everywhere.
    targets = np.array([[[[0, 0.5, 0.5], [0, 0, 0]]]])
    loss = compute_mask_losses(np.zeros((1, 1, 2, 3)), targets, np.array([[0, 0, 1]]))
    np.testing.assert_allclose(loss, [3 * np.log(2) + 1 - 2 * 0.25 / (0.25 + 0.5)], rtol=1e-5)


def test_missed_lesions_weigh_twice():
    missed = compute_mask_losses(np.full((1, 1, 1, 3), -2.0), np.array([[[[0, 1.0, 0]]]]), np.array([[0, 1, 0]]))
    p = 1 / (1 + np.exp(2))
    np.testing.assert_allclose(missed, [3 * 2 * -np.log(p) + 1 - 2 * p / (p + 1)], rtol=1e-5)


def test_mask_score_is_dice_of_the_lesions():
    logits = np.array([[[[0, 1, 0], [0, 1, 0], [0, -1, 0]]], [[[0, -1, 0]] * 3]])
    targets = np.zeros((2, 1, 3, 3))
    targets[0, 0, 1:, 1] = 1
    np.testing.assert_allclose(score_masks(logits, targets), [2 / 4, 1])


def test_objective_reads_bit_codes():
    batch = {'planes': np.zeros((2, 1, 1, 3)), 'known': np.array([2, 0], np.uint8)}
    objective = create_mask_objective()
    losses, scores = objective.compute(np.zeros((2, 1, 1, 3)), batch)
    np.testing.assert_allclose(losses, [3 * np.log(2), 0], atol=1e-6)
    np.testing.assert_array_equal(objective.weigh(batch), [1, 1])
    assert objective.score == 'dice'
    assert len(scores) == 2


def test_attention_loss_by_hand():
    # The lesion fills the left half of a map of 2 x 2: t = (1/2, 0, 1/2, 0).
    lesions = np.zeros((3, 2, 2), np.float32)
    lesions[:2, :, 0] = 0.5
    there, even = np.array([[0.5, 0], [0.5, 0]]), np.full((2, 2), 0.25)
    losses = compute_attention_losses([np.stack([there, even, even]), np.stack([even] * 3)], lesions)
    np.testing.assert_allclose(losses, [np.log(2) / 2, np.log(2), 0], atol=1e-6)
    gradients = jax.grad(lambda maps: compute_attention_losses([maps], lesions).sum())(np.stack([even] * 3))
    np.testing.assert_allclose(gradients[1:], [[[-2, 0], [-2, 0]], [[0, 0], [0, 0]]], atol=1e-5)  # -t / a


def test_attention_is_best_where_most_of_the_lesion_is_at_any_resolution():
    lesions = np.zeros((1, 40, 40), np.float32)
    lesions[0, 21:29, 1:9] = 1  # inside the position (3, 0) of 7 x 7
    maps = np.where(np.eye(49, dtype=bool), 0.52, 0.01).reshape(49, 7, 7)
    losses = compute_attention_losses([maps], np.repeat(lesions, 49, axis=0))
    assert losses.argmin() in (3 * 7, 4 * 7)
    assert losses[6] > losses.min() + 1


def test_attention_loss_is_added_before_weighing():
    plain = create_cross_entropy((0.5, 1.0, 1.0))
    taught = add_attention_loss(plain, 3.0)
    planes = np.zeros((2, 2, 2, 3), np.float32)
    planes[0, :, 0, 1] = 1
    planes[1, ..., [0, 2]] = 1  # lungs and consolidation teach nothing
    batch = {'label': np.array([0, 2]), 'planes': planes}
    logits, even = np.zeros((2, 3)), np.full((2, 2, 2), 0.25)
    losses, scores = taught.compute((logits, (even, even)), batch)
    expected, expected_scores = plain.compute(logits, batch)
    np.testing.assert_allclose(losses - expected, [3 * 0.5 * np.log(2), 0], atol=1e-6)
    np.testing.assert_array_equal(scores, expected_scores)
