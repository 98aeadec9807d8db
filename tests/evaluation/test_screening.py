import json

import numpy as np
import pytest

from covidjax.data.lists import CLASSES
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.metrics import compute_wilson_interval
from covidjax.evaluation.screening import (
    PREVALENCES,
    choose_threshold,
    compute_decision_curve,
    compute_operating_point,
    compute_predictive_values,
    compute_target_scores,
    evaluate_rules,
    find_target,
    fit_rules,
)


def draw(num_patients, seed):
    """Returns logits four times too large, labels, and patients of five slices each."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(num_patients), 5)
    labels = patients % 3
    x = 2.5 * np.eye(3)[labels] + rng.normal(size=(num_patients, 3))[patients] + rng.normal(size=(len(patients), 3))
    return 4 * (2.5 / 2) * x, labels, [f'p{i}' for i in patients]  # x has variance 2


def test_targets_by_hand():
    p = np.array([[0.5, 0.2, 0.3]])
    assert compute_target_scores(p, CLASSES, 'covid19').tolist() == [0.3]
    assert compute_target_scores(p, CLASSES, 'disease').tolist() == [0.5]
    assert find_target(np.array([0, 1, 2]), CLASSES, 'covid19').tolist() == [False, False, True]
    assert find_target(np.array([0, 1, 2]), CLASSES, 'disease').tolist() == [False, True, True]


def test_threshold_by_hand():
    # At least three of four positives must reach the threshold: 0.4 is the highest such. Two negatives reach it too.
    scores = np.array([0.9, 0.8, 0.4, 0.3, 0.4, 0.5, 0.2, 0.1])
    positive = np.repeat([True, False], 4)
    result = choose_threshold(scores, positive, list('aabbcdef'), 0.75)
    assert result['threshold'] == 0.4
    assert (result['sensitivity'], result['specificity']) == (0.75, 0.5)
    assert [result[k] for k in ('tp', 'fp', 'fn', 'tn')] == [3, 2, 1, 2]
    assert result['num_positive_patients'] == 2
    assert result['sensitivity_lower'] == compute_wilson_interval(1.5, 2)[0]
    assert result['attainable_sensitivity_lower'] == compute_wilson_interval(2, 2)[0]
    assert result['note'].startswith('2 positive patients are too few to support a sensitivity of 0.75')
    assert choose_threshold(scores, positive, list('aabbcdef'), 0.7500001)['threshold'] == 0.3


@pytest.mark.parametrize('target', [0.07, 0.5, 0.9, 0.98, 1.0])
def test_threshold_is_the_highest_that_reaches_the_target(target):
    rng = np.random.default_rng(0)
    positive = np.repeat([True, False], 100)
    scores = np.round(rng.random(200), 2) + positive / 2  # with ties
    result = choose_threshold(scores, positive, np.arange(200), target)
    assert result['sensitivity'] >= target
    higher = scores[scores > result['threshold']].min(initial=2)
    assert (scores[positive] >= higher).mean() < target


def test_enough_patients_need_no_note():
    # Wilson's lower bound for n of n is n / (n + 1.96^2): a bound of 0.98 needs 189 patients.
    for num_patients, is_enough in ((188, False), (189, True)):
        result = choose_threshold(np.ones(num_patients), np.ones(num_patients, bool), np.arange(num_patients))
        assert ('note' not in result) == is_enough
        assert (result['sensitivity'], result['specificity']) == (1, None)


def test_threshold_without_positives_is_stated():
    result = choose_threshold(np.array([0.1, 0.2]), np.zeros(2, bool), ['a', 'b'])
    assert (result['threshold'], result['sensitivity'], result['tp']) == (None, None, None)
    assert result['note'] == 'No validation example is positive: no threshold was chosen.'
    with pytest.raises(ValueError, match='98'):
        choose_threshold(np.ones(1), np.ones(1, bool), ['a'], 98)


def test_predictive_values_by_hand():
    # Of 1,000 people screened 100 are ill, and 90 of them are found. Of 900 healthy people 180 are false alarms.
    ppv, npv = compute_predictive_values(0.9, 0.8, 0.1)
    assert (ppv, npv) == pytest.approx((90 / 270, 720 / 730))
    assert compute_predictive_values(0.0, 1.0, 0.1) == (None, 0.9)
    assert compute_predictive_values(1.0, 0.0, 0.1) == (0.1, None)


def test_operating_point_by_hand():
    scores = np.array([0.9, 0.6, 0.5, 0.1, 0.7, 0.2, 0.1, 0.1, 0.3, 0.1])
    positive = np.repeat([True, False], [4, 6])
    result = compute_operating_point(scores, positive, np.arange(10), 0.5)
    assert [result[k] for k in ('tp', 'fp', 'fn', 'tn')] == [3, 1, 1, 5]
    assert (result['sensitivity'], result['specificity']) == pytest.approx((3 / 4, 5 / 6))
    assert result['sensitivity_interval'] == pytest.approx([0.25, 1])  # of 4 coins with probability 3/4
    assert result['sensitivity_wilson'] == pytest.approx(compute_wilson_interval(3, 4))
    values = result['predictive_values']
    assert [v['prevalence'] for v in values] == [*PREVALENCES, 0.4]
    assert [v['is_test_share'] for v in values] == [False] * len(PREVALENCES) + [True]
    assert (values[-1]['ppv'], values[-1]['npv']) == pytest.approx((3 / 4, 5 / 6))  # at the test's prevalence
    for v in values:
        assert v['ppv_interval'][0] <= v['ppv'] <= v['ppv_interval'][1]
        assert v['npv_interval'][0] <= v['npv'] <= v['npv_interval'][1]
    low, high = (result[f'{name}_interval'][0] for name in ('sensitivity', 'specificity'))
    assert values[0]['npv_interval'][0] == compute_predictive_values(low, high, 0.01)[1]
    json.dumps(result, allow_nan=False)


def test_operating_point_of_perfect_and_inverted_tests():
    positive = np.repeat([True, False], 10)
    perfect = compute_operating_point(positive.astype(float), positive, np.arange(20), 0.5)
    assert (perfect['sensitivity'], perfect['specificity']) == (1, 1)
    assert perfect['sensitivity_interval'] == compute_wilson_interval(10, 10)  # not [1, 1]
    assert perfect['predictive_values'][0]['ppv'] == 1
    assert perfect['predictive_values'][0]['ppv_interval'][0] < 0.1  # at a prevalence of 0.01 ten negatives are too few
    inverted = compute_operating_point(1.0 - positive, positive, np.arange(20), 0.5)
    assert (inverted['sensitivity'], inverted['specificity']) == (0, 0)
    assert inverted['predictive_values'][0]['ppv'] == 0


def test_operating_point_that_never_calls_has_no_ppv():
    positive = np.repeat([True, False], 10)
    result = compute_operating_point(np.zeros(20), positive, np.arange(20), 0.5)
    assert (result['sensitivity'], result['specificity']) == (0, 1)
    value = result['predictive_values'][-1]
    assert (value['ppv'], value['ppv_interval'], value['npv']) == (None, None, 0.5)


@pytest.mark.parametrize(('positive', 'missing'), [(True, 'negative'), (False, 'positive')])
def test_operating_point_of_one_class_is_stated(positive, missing):
    result = compute_operating_point(np.ones(3), np.full(3, positive), ['a', 'b', 'c'], 0.5)
    assert result['note'] == f'No test example is {missing}.'
    assert result['predictive_values'] == []
    assert (result['specificity' if positive else 'sensitivity']) is None
    json.dumps(result, allow_nan=False)


def test_operating_point_of_one_mixed_patient_has_no_interval_by_patient():
    result = compute_operating_point(np.array([1.0, 0, 0]), np.array([True, True, False]), ['a', 'a', 'b'], 0.5)
    assert result['sensitivity_interval'] is None
    assert result['predictive_values'][0]['ppv_interval'][0] < result['predictive_values'][0]['ppv']


def test_decision_curve_by_hand():
    # Of five: at 0.5 two found, one false alarm, odds 1; at 0.2 three found, one false alarm, odds 1/4.
    scores, positive = np.array([0.9, 0.6, 0.3, 0.7, 0.1]), np.array([True, True, True, False, False])
    curve = compute_decision_curve(scores, positive, [0.2, 0.5])
    assert curve['model'] == pytest.approx([3 / 5 - 1 / 20, 2 / 5 - 1 / 5])
    assert curve['all'] == pytest.approx([3 / 5 - 2 / 20, 3 / 5 - 2 / 5])
    assert curve['none'] == [0, 0]


def test_decision_curve_of_a_perfect_and_a_constant_test():
    positive = np.repeat([True, False], [3, 7])
    perfect = compute_decision_curve(positive.astype(float), positive, [0.1, 0.5, 0.9])
    assert perfect['model'] == pytest.approx([0.3] * 3)
    constant = compute_decision_curve(np.full(10, 0.3), positive, [0.2, 0.4])
    assert constant['model'] == pytest.approx([constant['all'][0], 0])
    assert compute_decision_curve(np.zeros(0), np.zeros(0, bool), [0.5])['model'] is None
    with pytest.raises(ValueError, match='between 0 and 1'):
        compute_decision_curve(np.ones(1), np.ones(1, bool), [1.0])


def test_rules_hold_on_other_patients():
    rules = json.loads(json.dumps(fit_rules(*draw(300, 0), CLASSES), allow_nan=False))
    assert rules['class_counts'] == dict.fromkeys(CLASSES, 500)
    assert rules['num_patients'] == 300
    assert rules['temperature'] == pytest.approx(4, rel=0.15)
    result = evaluate_rules(rules, *draw(300, 1), CLASSES, train_shares_K=[0.2, 0.3, 0.5])
    assert list(result) == [
        'calibration',
        'operating_points',
        'decision_curves',
        'conformal',
        'risk_coverage',
        'prior_correction',
    ]
    assert result['calibration']['after']['ece'] < result['calibration']['before']['ece']
    assert result['calibration']['after']['nll'] < result['calibration']['before']['nll']
    for target, point in result['operating_points'].items():
        assert rules['thresholds'][target]['sensitivity'] >= 0.98
        low, high = point['sensitivity_interval']
        assert low - 0.01 <= 0.98 <= high + 0.01
        assert point['specificity'] > 0.6
        curve = result['decision_curves'][target]
        assert np.mean(np.array(curve['model']) >= np.maximum(curve['all'], 0) - 0.005) > 0.9
    for found in result['conformal']['per_class'].values():
        assert found['coverage'] == pytest.approx(0.9, abs=0.1)  # 100 patients per class and split: standard error 0.03
    assert result['risk_coverage']['accuracy_at']['0.5'] > result['risk_coverage']['accuracy_at']['1.0']
    assert result['prior_correction']['after']['brier'] < result['prior_correction']['before']['brier']
    json.dumps(result, allow_nan=False)


def test_thresholds_apply_to_scaled_probabilities():
    logits, labels, patients = draw(60, 0)
    rules = fit_rules(logits, labels, patients, CLASSES)
    scores = apply_temperature(logits, rules['temperature'])[:, 2]
    assert (scores[labels == 2] >= rules['thresholds']['covid19']['threshold']).mean() >= 0.98
    assert rules['thresholds']['covid19']['threshold'] in scores


def test_validation_without_covid19_is_stated():
    logits, labels, patients = draw(60, 0)
    kept = labels != 2
    rules = fit_rules(logits[kept], labels[kept], np.array(patients)[kept], CLASSES)
    assert rules['thresholds']['covid19']['threshold'] is None
    assert rules['conformal']['thresholds']['covid19'] == 1
    assert rules['conformal']['notes'] == [
        'Too few validation examples are covid19 (0) for a coverage of 0.9: it is in every set.',
    ]
    result = evaluate_rules(rules, logits, labels, patients, CLASSES, train_shares_K=[0.5, 0.4, 0.1])
    assert result['operating_points']['covid19'] == {
        'threshold': None,
        'note': 'No validation example is positive: no threshold was chosen.',
    }
    assert result['conformal']['per_class']['covid19']['coverage'] == 1


@pytest.mark.parametrize('kept', [lambda y: y == 0, lambda y: y < 0], ids=['one class', 'nothing'])
def test_test_set_of_one_class_or_none_is_stated(kept):
    logits, labels, patients = draw(60, 0)
    rules = fit_rules(logits, labels, patients, CLASSES)
    chosen = kept(labels)
    result = evaluate_rules(
        rules, logits[chosen], labels[chosen], np.array(patients)[chosen], CLASSES, train_shares_K=[0.5, 0.4, 0.1]
    )
    assert result['operating_points']['covid19']['note'] == 'No test example is positive.'
    assert result['prior_correction']['before'] is None
    json.dumps(result, allow_nan=False)


def test_rules_of_other_classes_are_refused():
    rules = fit_rules(*draw(60, 0), CLASSES)
    with pytest.raises(ValueError, match='the rules are for classes'):
        evaluate_rules(rules, *draw(60, 1), CLASSES[::-1], train_shares_K=[1 / 3] * 3)
