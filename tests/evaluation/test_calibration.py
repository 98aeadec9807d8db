import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from covidjax.data.lists import CLASSES
from covidjax.evaluation.calibration import (
    TEMPERATURES,
    apply_temperature,
    compute_brier,
    compute_calibration,
    compute_prior_correction,
    correct_prior,
    fit_temperature,
)


def draw_calibrated(num_examples, seed):
    """Returns logits, and labels drawn from their softmax."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(num_examples, 3))
    p = apply_temperature(logits, 1.0)
    return logits, (rng.random((num_examples, 1)) > np.cumsum(p, axis=1)).sum(1)


@pytest.mark.parametrize('temperature', [0.4, 1.0, 3.0])
def test_temperature_is_recovered(temperature):
    logits, labels = draw_calibrated(20_000, 0)
    found = fit_temperature(temperature * logits, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    before, after = (compute_calibration(apply_temperature(temperature * logits, t), labels) for t in (1.0, found))
    assert after['ece'] < 0.015
    assert after['nll'] <= before['nll'] + 1e-6
    assert after['brier'] <= before['brier'] + 1e-4


def test_all_right_stays_within_what_their_number_supports():
    labels = np.arange(99) % 3
    t = fit_temperature(1000 * np.eye(3, dtype=np.float32)[labels], labels)
    # The fit reaches the smoothed target (N + 1) / (N + K) = 100 / 102 exactly, unless T reaches its bound.
    assert t == pytest.approx(TEMPERATURES[1], rel=1e-3)
    t = fit_temperature(20 * np.eye(3, dtype=np.float32)[labels], labels)
    assert apply_temperature(20 * np.eye(3), t)[0, 0] == pytest.approx(100 / 102, abs=1e-4)


def test_temperature_of_all_wrong_and_of_nothing():
    labels = np.arange(30) % 3
    assert fit_temperature(5 * np.eye(3)[(labels + 1) % 3], labels) == pytest.approx(TEMPERATURES[1], rel=1e-3)
    with pytest.raises(ValueError, match='none'):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, int))


def test_apply_temperature_by_hand():
    np.testing.assert_allclose(apply_temperature(np.array([[np.log(9), 0]]), 2.0), [[0.75, 0.25]])


def test_calibration_by_hand():
    # Bins of 1/15: 0.7 falls in (10/15, 11/15], twice, one of them correct; 0.9 in (13/15, 14/15], correct.
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.05, 0.05, 0.9]])
    result = compute_calibration(p, np.array([0, 2, 2]))
    assert result['ece'] == pytest.approx((2 * abs(0.5 - 0.7) + abs(1 - 0.9)) / 3)
    assert result['brier'] == pytest.approx(((0.09 + 0.04 + 0.01) + (0.01 + 0.49 + 0.64) + (0.0025 * 2 + 0.01)) / 3)
    assert result['nll'] == pytest.approx(-np.log([0.7, 0.2, 0.9]).mean())
    assert len(result['bins']) == 15
    assert result['bins'][10] == pytest.approx(
        {'low': 10 / 15, 'high': 11 / 15, 'confidence': 0.7, 'accuracy': 0.5, 'count': 2}
    )
    assert result['bins'][0] == {
        'low': 0,
        'high': pytest.approx(1 / 15),
        'confidence': None,
        'accuracy': None,
        'count': 0,
    }
    assert sum(b['count'] for b in result['bins']) == 3


def test_brier_and_nll_equal_scikit_learn():
    logits, labels = draw_calibrated(200, 1)
    p = apply_temperature(logits, 1.0)
    result = compute_calibration(p, labels)
    assert result['nll'] == pytest.approx(log_loss(labels, p))
    by_class = [brier_score_loss(labels == c, p[:, c]) for c in range(3)]
    assert result['brier'] == pytest.approx(sum(by_class))


@pytest.mark.parametrize(('shift', 'ece', 'brier'), [(0, 0, 0), (1, 1, 2)])
def test_certain_and_right_or_wrong(shift, ece, brier):
    labels = np.arange(9) % 3
    result = compute_calibration(np.eye(3)[(labels + shift) % 3], labels)
    assert (result['ece'], result['brier']) == (ece, brier)
    assert result['nll'] == pytest.approx(-np.log(np.finfo(float).eps) if shift else 0)
    assert result['bins'][14]['count'] == 9
    json.dumps(result, allow_nan=False)


def test_uniform_guess():
    result = compute_calibration(np.full((9, 3), 1 / 3), np.arange(9) % 3)
    assert result['ece'] == pytest.approx(0)
    assert result['brier'] == pytest.approx(2 / 3)
    assert result['nll'] == pytest.approx(np.log(3))


def test_calibration_of_nothing():
    result = compute_calibration(np.zeros((0, 3)), np.zeros(0, int))
    assert (result['ece'], result['brier'], result['nll']) == (None, None, None)
    assert all(b['count'] == 0 for b in result['bins'])


def test_correct_prior_is_bayes_rule_by_hand():
    # Likelihoods 0.2 and 0.6. Equal shares: 0.25 and 0.75; shares 0.9 and 0.1: 0.18 and 0.06, hence 0.75 and 0.25.
    corrected = correct_prior(np.array([[0.25, 0.75]]), [0.5, 0.5], [0.9, 0.1])
    np.testing.assert_allclose(corrected, [[0.75, 0.25]])
    np.testing.assert_allclose(correct_prior(corrected, [0.9, 0.1], [0.5, 0.5]), [[0.25, 0.75]])
    with pytest.raises(ValueError, match='positive'):
        correct_prior(corrected, [1.0, 0.0], [0.5, 0.5])


def test_weighted_loss_teaches_equal_shares():
    # One feature, N(0, 1) or N(2, 1), shares 0.9 and 0.1: under equal shares logit p(1|x) = 2x - 2.
    rng = np.random.default_rng(0)
    labels = (rng.random(40_000) < 0.1).astype(int)
    x = rng.normal(size=(40_000, 1)) + 2 * labels[:, None]
    weights = np.bincount(labels).min() / np.bincount(labels)
    model = LogisticRegression(C=1e6).fit(x, labels, weights[labels])
    assert (model.coef_[0, 0], model.intercept_[0]) == pytest.approx((2, -2), abs=0.1)
    grid = np.array([[0.0], [1.0], [2.0]])
    bayes = 1 / (1 + 9 * np.exp(2 - 2 * grid[:, 0]))  # under shares of 0.9 and 0.1
    corrected = correct_prior(model.predict_proba(grid), [0.5, 0.5], [0.9, 0.1])[:, 1]
    np.testing.assert_allclose(corrected, bayes, atol=0.02)


def test_prior_correction_by_hand():
    # Recall before: 1 of 2 normal, 1 of 1, 1 of 1. Weighted by 0.8 : 0.1 : 0.1, only the normal ones are correct.
    p = np.array([[0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    shares = {'train_shares_K': [0.2, 0.3, 0.5], 'to_shares_K': [0.8, 0.1, 0.1]}
    result = compute_prior_correction(p, np.array([0, 0, 1, 2]), list('abcd'), CLASSES, **shares)
    assert result['from_shares'] == pytest.approx(dict.fromkeys(CLASSES, 1 / 3))
    assert result['train_shares'] == {'normal': 0.2, 'pneumonia': 0.3, 'covid19': 0.5}
    assert result['before']['accuracy'] == pytest.approx(0.8 * 0.5 + 0.2)
    assert result['before']['balanced_accuracy'] == pytest.approx((0.5 + 1 + 1) / 3)
    brier = compute_brier(p, np.array([0, 0, 1, 2]))
    assert result['before']['brier'] == pytest.approx(0.8 * brier[:2].mean() + 0.1 * brier[2] + 0.1 * brier[3])
    assert result['after']['accuracy'] == pytest.approx(0.8)
    assert result['after']['balanced_accuracy'] == pytest.approx(1 / 3)
    assert result['before']['accuracy_interval'] == pytest.approx([0.2, 1])
    json.dumps(result, allow_nan=False)


def test_prior_correction_helps_where_the_model_is_right():
    rng = np.random.default_rng(0)
    labels = np.arange(3000) % 3
    x = rng.normal(size=(3000, 3)) + 1.5 * np.eye(3)[labels]
    p = apply_temperature(1.5 * x, 1.0)  # the posterior under equal shares
    result = compute_prior_correction(
        p, labels, np.arange(3000) // 3, CLASSES, train_shares_K=[0.2, 0.3, 0.5], to_shares_K=[0.8, 0.1, 0.1]
    )
    assert result['after']['accuracy'] > result['before']['accuracy_interval'][1]
    assert result['after']['brier'] < result['before']['brier_interval'][0]
    assert result['after']['balanced_accuracy'] < result['before']['balanced_accuracy']


def test_prior_correction_without_a_class_is_stated():
    result = compute_prior_correction(
        np.full((2, 3), 1 / 3),
        np.array([0, 1]),
        ['a', 'b'],
        CLASSES,
        train_shares_K=[1 / 3] * 3,
        to_shares_K=[1 / 3] * 3,
    )
    assert (result['before'], result['after']) == (None, None)
    assert result['note'] == 'No example is covid19: other class shares cannot be imitated.'
