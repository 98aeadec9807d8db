import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score

from covidjax.evaluation.metrics import (
    compute_auc,
    compute_metrics,
    compute_scores,
    draw_resamples,
    format_table,
)

CLASSES = ('normal', 'pneumonia', 'covid19')


def test_table_iv_of_the_paper():
    # The confusion matrix that Table IV inverts to; the paper prints three decimals.
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
    # One normal patient of three, all right: a resample that misses him leaves his class undefined, not wrong.
    metrics = compute_metrics(np.array([0, 1, 1]), np.array([0, 1, 1]), ['a', 'b', 'c'], CLASSES)
    assert metrics['intervals']['per_class']['normal']['recall'] == [1, 1]
    assert metrics['intervals']['per_class']['covid19']['recall'] is None
    assert metrics['per_class']['covid19']['recall'] == 0
    assert '-' in format_table(metrics, unit='Slices')


def test_interval_resamples_patients_not_slices():
    # 10 patients of 100 slices, half of them wholly right: the interval is that of 10 coins, not of 1,000.
    labels = np.zeros(1000, int)
    predicted = np.repeat([0, 1] * 5, 100)
    patients = np.repeat(np.arange(10).astype(str), 100)
    low, high = compute_metrics(labels, predicted, patients, CLASSES)['intervals']['accuracy']
    assert low == pytest.approx(0.2, abs=0.01)
    assert high == pytest.approx(0.8, abs=0.01)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    # 200 studies of 60 patients of 5 slices whose accuracy differs by patient; the mean is 0.8.
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
    assert 0.89 <= covered / 200 <= 0.99  # 0.95 less a little for 60 patients; standard error 0.015


def test_resamples_draw_as_many_patients_as_there_are():
    resamples = draw_resamples(7, seed=0, num_resamples=50)
    assert (resamples.sum(1) == 7).all()
    np.testing.assert_array_equal(resamples, draw_resamples(7, seed=0, num_resamples=50))


def test_auc_equals_scikit_learn_and_has_known_ends():
    rng = np.random.default_rng(0)
    positive = rng.random(50) < 0.4
    scores = np.round(rng.normal(size=50) + positive, 1)  # with ties
    assert compute_auc(scores, positive)['auc'] == pytest.approx(roc_auc_score(positive, scores))
    perfect = compute_auc(positive.astype(float), positive)
    assert (perfect['auc'], perfect['interval']) == (1.0, [1.0, 1.0])
    assert compute_auc(-positive.astype(float), positive)['auc'] == 0.0
    assert compute_auc(np.zeros(50), positive)['auc'] == 0.5


def test_auc_of_one_class_is_stated_as_none():
    result = compute_auc(np.array([0.1, 0.2]), np.array([True, True]))
    assert result == {'auc': None, 'interval': None, 'num_positive': 2, 'num_negative': 0}


def test_table_shows_the_papers_columns():
    labels = np.repeat([0, 1, 2], 10)
    table = format_table(compute_metrics(labels, labels, np.arange(30).astype(str), CLASSES), unit='Slices')
    lines = table.splitlines()
    assert lines[0].split() == ['Class', 'Precision', 'Recall', 'F1', 'Slices']
    assert lines[3].split() == ['covid19', *['1.000', '[1.000,', '1.000]'] * 3, '10']
    assert lines[4].startswith('weighted average')
