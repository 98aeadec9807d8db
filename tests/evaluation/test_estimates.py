import numpy as np
import pytest

from covidjax.evaluation.calibration import compute_calibration
from covidjax.evaluation.curves import compute_curves
from covidjax.evaluation.estimates import (
    UNDEFINED,
    draw_sample,
    estimate_auc,
    estimate_ece,
    estimate_mean,
    subtract,
)
from covidjax.evaluation.metrics import compute_metrics, compute_wilson_interval

CLASSES = ('normal', 'pneumonia', 'covid19')


def make_predictions(count, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    probabilities = rng.dirichlet(np.ones(3), count) + 0.8 * np.eye(3)[labels]
    probabilities /= probabilities.sum(1, keepdims=True)
    return labels, probabilities, [f'p{i // 3}' for i in range(count)]


def test_estimates_are_those_of_the_report():
    labels, probabilities, patients = make_predictions(150, 0)
    sample = draw_sample(patients, seed=0)
    metrics = compute_metrics(labels, probabilities.argmax(1), patients, CLASSES)
    accuracy = estimate_mean(sample, probabilities.argmax(1) == labels)
    assert accuracy.value == pytest.approx(metrics['accuracy'])
    np.testing.assert_allclose(accuracy.interval, metrics['intervals']['accuracy'])
    recall = estimate_mean(sample, probabilities.argmax(1) == labels, labels == 2)
    np.testing.assert_allclose(recall.interval, metrics['intervals']['per_class']['covid19']['recall'])
    curves = compute_curves(labels, probabilities, patients, CLASSES)['per_class']['covid19']
    auc = estimate_auc(sample, probabilities[:, 2], labels == 2)
    assert auc.value == pytest.approx(curves['auc'])
    np.testing.assert_allclose(auc.interval, curves['auc_interval'])
    assert estimate_ece(sample, probabilities, labels).value == pytest.approx(
        compute_calibration(probabilities, labels)['ece']
    )


def test_a_difference_by_hand():
    # Two patients a side, one slice each: the resampled shares are 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4.
    first = estimate_mean(draw_sample(['a', 'b'], seed=0), np.array([True, False]))
    second = estimate_mean(draw_sample(['c', 'd'], seed=1), np.array([True, False]))
    found = subtract(first, second)
    assert found['difference'] == 0
    assert found['interval'] == [-1, 1]  # each has a chance of 1/16, more than 2.5 %


def test_interval_covers_a_known_difference():
    hits, runs = 0, 200
    rng = np.random.default_rng(0)
    for _ in range(runs):
        sides = []
        for seed, chance in ((0, 0.9), (1, 0.7)):
            right = rng.random(60) < chance
            sides.append(estimate_mean(draw_sample([str(i) for i in range(60)], seed=seed), right))
        low, high = subtract(*sides)['interval']
        hits += low <= 0.2 <= high
    assert 0.9 <= hits / runs <= 0.99


def test_a_share_of_one_keeps_an_interval():
    patients = [f'p{i}' for i in range(20)]
    first = estimate_mean(draw_sample(patients, seed=0), np.ones(20, bool))
    second = estimate_mean(draw_sample(patients, seed=1), np.arange(20) < 20)
    assert first.is_fixed
    assert first.interval == compute_wilson_interval(20, 20)
    width = 1 - first.interval[0]
    assert subtract(first, second)['interval'] == pytest.approx([-width, width])


def test_a_perfect_ranking_keeps_an_interval_unless_a_class_is_one_patient():
    labels = np.array([True] * 8 + [False] * 6)
    patients = [f'p{i // 2}' for i in range(14)]  # four positive and three negative patients
    auc = estimate_auc(draw_sample(patients, seed=0), labels.astype(float), labels)
    assert (auc.value, auc.interval, auc.is_fixed) == (1, compute_wilson_interval(3, 3), True)
    one = estimate_auc(draw_sample(['p0'] * 8 + patients[8:], seed=0), labels.astype(float), labels)
    assert (one.value, one.interval) == (1, None)


def test_undefined_stays_undefined():
    sample = draw_sample(['a', 'b'], seed=0)
    assert estimate_mean(sample, np.ones(2, bool), np.zeros(2, bool)) is UNDEFINED
    assert estimate_auc(sample, np.arange(2.0), np.ones(2, bool)) is UNDEFINED
    assert subtract(UNDEFINED, estimate_mean(sample, np.ones(2, bool))) == {'difference': None, 'interval': None}
    one = estimate_mean(draw_sample(['a', 'a'], seed=0), np.array([True, False]))
    assert one.value == 0.5
    assert one.interval is None  # one patient
