import json

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import (
    average_precision_score,
    classification_report,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from covidjax.data.lists import CLASSES
from covidjax.evaluation.metrics import (
    compute_metrics,
    compute_ranking,
    compute_ranking_scores,
    compute_scores,
    compute_share_interval,
    compute_wilson_interval,
    draw_resamples,
    format_table,
)


def test_table_iv_of_the_paper():
    # The confusion matrix that reproduces Table IV; the paper prints three decimals.
    scores = compute_scores(np.array([[171, 0, 3], [0, 98, 2], [0, 0, 134]]))
    np.testing.assert_allclose(scores['precision'], [1.000, 1.000, 0.964], atol=5e-4)
    np.testing.assert_allclose(scores['recall'], [0.983, 0.980, 1.000], atol=5e-4)
    np.testing.assert_allclose(scores['f1'], [0.991, 0.990, 0.982], atol=5e-4)
    for name in ('precision', 'recall', 'f1'):
        assert scores[f'weighted_{name}'] == pytest.approx(0.988, abs=5e-4)


def test_scores_equal_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, 200), rng.integers(0, 3, 200)
    scores = compute_scores(confusion_matrix(labels, predicted))
    expected = precision_recall_fscore_support(labels, predicted)
    for name, values in zip(('precision', 'recall', 'f1'), expected[:3], strict=True):
        np.testing.assert_allclose(scores[name], values)
    expected = precision_recall_fscore_support(labels, predicted, average='weighted')
    for name, value in zip(('precision', 'recall', 'f1'), expected[:3], strict=True):
        assert scores[f'weighted_{name}'] == pytest.approx(value)


def test_averages_equal_the_classification_report():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice(3, 200, p=[0.6, 0.3, 0.1]), rng.integers(0, 3, 200)
    metrics = compute_metrics(labels, predicted, np.arange(200), CLASSES)
    report = classification_report(labels, predicted, target_names=CLASSES, output_dict=True)
    for ours, theirs in (('macro_average', 'macro avg'), ('weighted_average', 'weighted avg')):
        for name, key in (('precision', 'precision'), ('recall', 'recall'), ('f1', 'f1-score')):
            assert metrics[ours][name] == pytest.approx(report[theirs][key])
            low, high = metrics['intervals'][ours][name]
            assert low < metrics[ours][name] < high


def test_specificity_and_npv_by_hand():
    # Class 0 against the others: 6 of 8 others are not called class 0; 7 examples in all are not.
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 1, 1]])
    scores = compute_scores(confusion)
    np.testing.assert_allclose(scores['specificity'], [6 / 8, 4 / 6, 10 / 10])
    np.testing.assert_allclose(scores['npv'], [6 / 7, 4 / 6, 10 / 11])


def test_one_class_is_stated_not_nan():
    metrics = compute_metrics(np.zeros(4, int), np.zeros(4, int), list('aabb'), CLASSES)
    normal = metrics['per_class']['normal']
    assert (normal['recall'], normal['specificity'], normal['npv']) == (1, None, None)
    assert metrics['intervals']['per_class']['normal']['specificity'] is None
    assert metrics['macro_average']['recall'] == 1  # over the one class that has examples
    assert 'Every example is normal: its specificity is undefined.' in metrics['notes']
    assert 'No example is covid19: its recall counts 0, and the macro averages leave it out.' in metrics['notes']
    json.dumps(metrics, allow_nan=False)


def test_no_examples_are_stated():
    metrics = compute_metrics(np.zeros(0, int), np.zeros(0, int), [], CLASSES)
    assert (metrics['accuracy'], metrics['macro_average']['f1'], metrics['num_patients']) == (None, None, 0)
    assert metrics['intervals']['accuracy'] is None
    assert metrics['notes'] == ['There are no examples.']
    assert 'accuracy          -' in format_table(metrics, unit='Slices')


def test_class_without_cases_or_calls_scores_zero():
    scores = compute_scores(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]))
    assert scores['precision'].tolist() == [1, 2 / 3, 0]
    assert scores['recall'].tolist() == [0.75, 1, 0]
    assert scores['accuracy'] == 5 / 6


@pytest.mark.parametrize(
    ('predict', 'accuracy'), [(lambda y: y, 1.0), (lambda y: (y + 1) % 3, 0.0), (lambda y: np.zeros_like(y), 1 / 3)]
)
def test_perfect_inverted_and_constant_classifiers(predict, accuracy):
    labels = np.repeat([0, 1, 2], 30)
    patients = [f'p{i // 3}' for i in range(90)]  # three slices each
    metrics = compute_metrics(labels, predict(labels), patients, CLASSES)
    assert metrics['accuracy'] == pytest.approx(accuracy)
    low, high = metrics['intervals']['accuracy']
    assert low <= accuracy <= high
    assert metrics['num_patients'] == 30
    assert [metrics['per_class'][c]['support'] for c in CLASSES] == [30, 30, 30]
    assert metrics['confusion_matrix'][0][int(predict(np.array([0]))[0])] == 30


def test_resamples_without_a_class_say_nothing_about_it():
    # Two of four patients are normal, each half right. In a resample without them the normal recall is undefined.
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 1, 1, 0, 1, 1])
    metrics = compute_metrics(labels, predicted, ['a', 'a', 'd', 'd', 'b', 'c'], CLASSES)
    assert metrics['intervals']['per_class']['normal']['recall'] == [0.5, 0.5]
    assert metrics['intervals']['per_class']['covid19']['recall'] is None
    assert metrics['per_class']['covid19']['recall'] == 0
    assert '-' in format_table(metrics, unit='Slices')


def test_interval_resamples_patients_not_slices():
    # 10 patients of 100 slices each, 5 of them all right: the interval is that of 10 coins, not of 1,000.
    labels = np.zeros(1000, int)
    predicted = np.repeat([0, 1] * 5, 100)
    patients = np.repeat(np.arange(10).astype(str), 100)
    low, high = compute_metrics(labels, predicted, patients, CLASSES)['intervals']['accuracy']
    assert low == pytest.approx(0.2, abs=0.01)
    assert high == pytest.approx(0.8, abs=0.01)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    # 200 studies of 60 patients with 5 slices each. Accuracy differs by patient; its mean is 0.8.
    rng = np.random.default_rng(1)
    covered = 0
    for study in range(200):
        right = rng.random((60, 5)) < rng.beta(4, 1, size=(60, 1))
        metrics = compute_metrics(
            np.zeros(300, int),
            1 - right.ravel().astype(int),
            np.repeat(np.arange(60).astype(str), 5),
            CLASSES,
            seed=study,
        )
        low, high = metrics['intervals']['accuracy']
        covered += low <= 0.8 <= high
    assert 0.89 <= covered / 200 <= 0.99  # slightly below 0.95 for 60 patients; standard error 0.015


def test_resamples_draw_as_many_patients_as_there_are():
    resamples = draw_resamples(7, seed=0, num_resamples=50)
    assert (resamples.sum(1) == 7).all()
    np.testing.assert_array_equal(resamples, draw_resamples(7, seed=0, num_resamples=50))


def test_ranking_equals_scikit_learn_and_has_known_ends():
    rng = np.random.default_rng(0)
    positive = rng.random(50) < 0.4
    patients = np.arange(50)
    scores = np.round(rng.normal(size=50) + positive, 1)  # with ties
    result = compute_ranking(scores, positive, patients)
    assert result['auc'] == pytest.approx(roc_auc_score(positive, scores))
    assert result['average_precision'] == pytest.approx(average_precision_score(positive, scores))
    perfect = compute_ranking(positive.astype(float), positive, patients)
    assert (perfect['auc'], perfect['auc_interval']) == (1.0, [1.0, 1.0])
    assert perfect['average_precision'] == 1.0
    assert compute_ranking(-positive.astype(float), positive, patients)['auc'] == 0.0
    constant = compute_ranking(np.zeros(50), positive, patients)
    assert constant['auc'] == 0.5
    assert constant['average_precision'] == pytest.approx(positive.mean())


def test_ranking_by_hand():
    # Positives 3 and 1, negatives 1 and 0: three of four pairs are right and one is tied. At threshold 3 half the
    # positives are found at precision 1, at threshold 1 the other half at 2/3.
    result = compute_ranking(np.array([3, 1, 1, 0]), np.array([True, True, False, False]), list('abcd'))
    assert result['auc'] == 3.5 / 4
    assert result['average_precision'] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_weighted_ranking_equals_scikit_learn(monkeypatch):
    monkeypatch.setattr('covidjax.evaluation.metrics._CHUNK', 150)  # fewer examples than two resamples hold
    rng = np.random.default_rng(0)
    groups, positive = rng.integers(0, 12, 100), rng.random(100) < 0.4
    scores = np.round(rng.normal(size=100) + positive, 1)
    weights = draw_resamples(12, seed=0, num_resamples=9)
    found = compute_ranking_scores(scores, positive, groups, weights)
    for i, weight in enumerate(weights[:, groups]):
        assert found['auc'][i] == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight))
        expected = average_precision_score(positive, scores, sample_weight=weight)
        assert found['average_precision'][i] == pytest.approx(expected)


def test_ranking_of_one_class_is_stated_as_none():
    result = compute_ranking(np.array([0.1, 0.2]), np.array([True, True]), ['a', 'b'])
    assert result == {
        'auc': None,
        'auc_interval': None,
        'average_precision': None,
        'average_precision_interval': None,
        'num_positive': 2,
        'num_negative': 0,
    }
    assert compute_ranking(np.zeros(0), np.zeros(0, bool), [])['auc'] is None


def test_resamples_without_positives_are_left_out():
    result = compute_ranking_scores(
        np.array([0.1, 0.2]), np.array([True, False]), np.arange(2), np.array([[1, 1], [0, 2]])
    )
    np.testing.assert_array_equal(result['auc'], [0, np.nan])


@pytest.mark.parametrize(('successes', 'trials', 'expected'), [(0, 10, [0, 0.2775]), (8, 10, [0.4902, 0.9433])])
def test_wilson_by_hand(successes, trials, expected):
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.95996
    assert compute_wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)


def test_wilson_equals_scipy():
    for successes in (0, 3, 17, 20):
        expected = binomtest(successes, 20).proportion_ci(0.9, method='wilson')
        assert compute_wilson_interval(successes, 20, 0.9) == pytest.approx(list(expected))


def test_wilson_without_trials():
    assert compute_wilson_interval(0, 0) is None


def test_share_interval_falls_back_to_wilson_over_patients():
    patients = np.repeat(list('abcdefghij'), 100)
    assert compute_share_interval(np.ones(1000, bool), patients) == compute_wilson_interval(10, 10)
    assert compute_share_interval(np.zeros(1000, bool), patients) == compute_wilson_interval(0, 10)
    low, high = compute_share_interval(np.repeat([True, False] * 5, 100), patients)
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.01)
    assert compute_share_interval(np.array([True, False]), ['a', 'a']) is None
    assert compute_share_interval(np.zeros(0, bool), []) is None


def test_share_of_clustered_examples_is_covered_by_patient_and_missed_by_slice():
    # 200 studies of 60 patients with 10 slices each. Accuracy differs by patient; its mean is 0.8.
    rng = np.random.default_rng(2)
    patients, slices = np.repeat(np.arange(60), 10), np.arange(600)
    covered = {'patient': 0, 'slice': 0}
    for study in range(200):
        right = (rng.random((60, 10)) < rng.beta(2, 0.5, size=(60, 1))).ravel()
        low, high = compute_share_interval(right, patients, seed=study)
        covered['patient'] += low <= 0.8 <= high
        low, high = compute_wilson_interval(int(right.sum()), len(slices))
        covered['slice'] += low <= 0.8 <= high
    assert 0.89 <= covered['patient'] / 200 <= 0.99
    assert covered['slice'] / 200 < 0.8


def test_lower_end_of_a_high_share_holds_with_a_trial_per_patient():
    # 300 studies of 25 patients with 20 slices each, 98 % right on average. Most have at most one hard patient.
    rng = np.random.default_rng(0)
    patients, held = np.repeat(np.arange(25), 20), {'wilson': 0, 'bootstrap': 0}
    for study in range(300):
        right = (rng.random((25, 20)) < rng.beta(1.96, 0.04, size=(25, 1))).ravel()
        held['wilson'] += compute_wilson_interval(25 * right.mean(), 25)[0] <= 0.98
        held['bootstrap'] += compute_share_interval(right, patients, seed=study)[0] <= 0.98
    assert held['wilson'] / 300 >= 0.93
    assert held['bootstrap'] / 300 < 0.9


def test_table_shows_the_papers_columns():
    labels = np.repeat([0, 1, 2], 10)
    table = format_table(compute_metrics(labels, labels, np.arange(30).astype(str), CLASSES), unit='Slices')
    lines = table.splitlines()
    assert lines[0].split() == ['Class', 'Precision', 'Recall', 'F1', 'Slices']
    # Ten patients, all right: Wilson's lower end is 10 / (10 + 1.96^2).
    assert lines[3].split() == ['covid19', *['1.000', '[0.722,', '1.000]'] * 2, '1.000', '[-]', '10']
    assert lines[4].startswith('weighted average')


def test_a_perfect_score_has_a_wilson_interval_by_patient():
    labels = np.array([0, 0, 1, 1, 2, 2])
    metrics = compute_metrics(labels, labels, ['a', 'a', 'b', 'c', 'd', 'd'], ('x', 'y', 'z'))
    intervals = metrics['intervals']
    # If all of n patients are right, Wilson's lower end is n / (n + z^2).
    z2 = 1.959964**2
    assert intervals['accuracy'] == pytest.approx([4 / (4 + z2), 1])
    assert intervals['per_class']['y']['recall'] == pytest.approx([2 / (2 + z2), 1])
    assert intervals['per_class']['y']['specificity'] == pytest.approx([2 / (2 + z2), 1])
    assert intervals['per_class']['x']['precision'] == pytest.approx([1 / (1 + z2), 1])
    assert intervals['per_class']['x']['f1'] is None
    assert intervals['weighted_average']['f1'] is None


def test_one_patient_gives_no_interval():
    metrics = compute_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), ['a', 'a', 'b', 'c'], CLASSES)
    assert metrics['per_class']['normal']['recall'] == 0.5
    assert metrics['intervals']['per_class']['normal']['recall'] is None
    assert metrics['intervals']['accuracy'] is not None
