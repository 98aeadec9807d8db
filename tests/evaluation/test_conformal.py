import json

import numpy as np
import pytest

from covidjax.data.lists import CLASSES
from covidjax.evaluation.conformal import (
    compute_conformal,
    compute_risk_coverage,
    fit_thresholds,
    predict_sets,
)


def draw(labels, seed):
    """Returns probabilities that favour the true class, less so for later classes."""
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(size=(len(labels), 3)) + (2.5 - labels)[:, None] * np.eye(3)[labels])
    return scores / scores.sum(1, keepdims=True)


def test_threshold_is_the_rank_that_corrects_for_finite_samples():
    # Class 0 has nine scores 0.1 .. 0.9: take the ceil(10 * 0.8) = 8th. Class 1 has three, and ceil(4 * 0.8) = 4.
    p_true = np.concatenate([1 - np.arange(1, 10) / 10, [0.9, 0.8, 0.7]])
    labels = np.repeat([0, 1], [9, 3])
    p = np.where(np.eye(2, dtype=bool)[labels], p_true[:, None], 1 - p_true[:, None])
    assert fit_thresholds(p, labels, 0.8) == pytest.approx([0.8, 1])
    assert fit_thresholds(p, labels, 0.75) == pytest.approx([0.8, 0.3])
    with pytest.raises(ValueError, match='between 0 and 1'):
        fit_thresholds(p, labels, 1.5)


def test_sets_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.0, 1.0, 0.0]])
    sets = predict_sets(p, [0.6, 0.7, 1.0])
    np.testing.assert_array_equal(sets, [[True, False, True], [True, True, True], [False, True, True]])


def test_coverage_of_each_class_holds_on_average():
    # 300 studies, each with 24 validation and 100 test examples per class; rank 23 of 24 covers 23 / 25 on average.
    val_labels, test_labels = np.repeat([0, 1, 2], 24), np.repeat([0, 1, 2], 100)
    covered = np.zeros(3)
    for study in range(300):
        thresholds = fit_thresholds(draw(val_labels, 2 * study), val_labels, 0.9)
        sets = predict_sets(draw(test_labels, 2 * study + 1), thresholds)
        covered += sets[np.arange(300), test_labels].reshape(3, 100).mean(1) / 300
    np.testing.assert_allclose(covered, 23 / 25, atol=0.012)  # standard error 0.004


def test_one_share_of_sets_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    labels = np.array([0, 0, 0, 1])
    result = compute_conformal(p, labels, ['a', 'b', 'c', 'd'], [0.6, 0.65, 0.5], CLASSES)
    # Sets: {normal}, {normal, pneumonia}, {pneumonia}, {}.
    assert (result['single'], result['multiple'], result['empty'], result['mean_size']) == (0.5, 0.25, 0.25, 1)
    assert result['single_accuracy'] == 0.5
    normal, pneumonia, covid19 = (result['per_class'][c] for c in CLASSES)
    assert normal['coverage'] == pytest.approx(2 / 3)
    assert normal['interval'][0] < 2 / 3 < normal['interval'][1]
    assert (pneumonia['coverage'], pneumonia['num_examples']) == (0, 1)
    assert covid19 == {'coverage': None, 'interval': None, 'num_examples': 0}
    json.dumps(result, allow_nan=False)


def test_sets_of_nothing():
    result = compute_conformal(np.zeros((0, 3)), np.zeros(0, int), [], [0.5] * 3, CLASSES)
    assert (result['mean_size'], result['single'], result['single_accuracy']) == (None, None, None)


def test_risk_coverage_by_hand():
    # In order of confidence: right, wrong, right, right.
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.6, 0.4]])
    result = compute_risk_coverage(p, np.array([0, 0, 0, 0]))
    assert result['coverage'] == [0.25, 0.5, 0.75, 1]
    assert result['risk'] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert result['aurc'] == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert result['accuracy_at'] == pytest.approx({'0.5': 0.5, '0.8': 0.75, '0.9': 0.75, '1.0': 0.75})


def test_risk_of_ties_does_not_depend_on_their_order():
    p = np.tile([0.6, 0.4], (4, 1))
    for labels in ([0, 0, 1, 1], [1, 1, 0, 0]):
        assert compute_risk_coverage(p, np.array(labels))['risk'] == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(('shift', 'risk'), [(0, 0), (1, 1)])
def test_risk_of_perfect_and_inverted_classifiers(shift, risk):
    labels = np.arange(900) % 3
    result = compute_risk_coverage(0.1 + 0.7 * np.eye(3)[(labels + shift) % 3], labels)
    assert set(result['risk']) == {risk}
    assert result['aurc'] == risk
    assert len(result['coverage']) == 200
    assert (result['coverage'][0], result['coverage'][-1]) == (1 / 900, 1)


def test_risk_of_nothing():
    assert compute_risk_coverage(np.zeros((0, 3)), np.zeros(0, int))['aurc'] is None
