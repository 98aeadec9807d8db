import json

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from covidjax.data.lists import CLASSES
from covidjax.evaluation.curves import MAX_POINTS, compute_curves, thin
from covidjax.evaluation.metrics import compute_ranking


def draw(num_examples, seed, *, decimals=3):
    """Returns labels, probabilities that favour them (with ties) and patients of about five examples each."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, num_examples)
    scores = np.exp(rng.normal(size=(num_examples, 3)) + np.eye(3)[labels])
    return (
        labels,
        np.round(scores / scores.sum(1, keepdims=True), decimals),
        rng.integers(0, num_examples // 5, len(labels)),
    )


def test_curves_by_hand():
    # For class 1: positives 0.9 and 0.3, negatives 0.4 and 0.1.
    p = np.array([0.9, 0.4, 0.3, 0.1])
    curves = compute_curves(np.array([1, 0, 1, 0]), np.stack([1 - p, p], 1), list('abcd'), ('a', 'b'))
    b = curves['per_class']['b']
    assert b['roc'] == {'fpr': [0, 0, 0.5, 0.5, 1], 'tpr': [0, 0.5, 0.5, 1, 1]}
    assert b['precision_recall']['recall'] == [0, 0.5, 0.5, 1, 1]
    assert b['precision_recall']['precision'] == pytest.approx([1, 1, 1 / 2, 2 / 3, 1 / 2])
    assert b['auc'] == 0.75
    assert b['average_precision'] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert (b['num_positive'], b['num_negative']) == (2, 2)


def test_scores_equal_scikit_learn():
    labels, p, patients = draw(150, 0, decimals=1)
    curves = compute_curves(labels, p, patients, CLASSES)
    for i, name in enumerate(CLASSES):
        found = curves['per_class'][name]
        assert found['auc'] == pytest.approx(roc_auc_score(labels == i, p[:, i]))
        assert found['average_precision'] == pytest.approx(average_precision_score(labels == i, p[:, i]))
        fpr, tpr, _ = roc_curve(labels == i, p[:, i])
        assert found['roc'] == {'fpr': fpr.tolist(), 'tpr': tpr.tolist()}
        assert auc(fpr, tpr) == pytest.approx(found['auc'])
        precision, recall, _ = precision_recall_curve(labels == i, p[:, i])
        assert found['precision_recall'] == {'recall': recall[::-1].tolist(), 'precision': precision[::-1].tolist()}
        low, high = found['auc_interval']
        assert low < found['auc'] < high
        assert found['auc_interval'] == compute_ranking(p[:, i], labels == i, patients)['auc_interval']
    mean = np.mean([curves['per_class'][name]['auc'] for name in CLASSES])
    assert curves['macro_auc'] == pytest.approx(mean)
    assert curves['macro_auc_interval'][0] < mean < curves['macro_auc_interval'][1]
    assert 'note' not in curves


@pytest.mark.parametrize(('score', 'auc', 'interval'), [(1, 1, [1, 1]), (0, 0.5, [0.5, 0.5]), (-1, 0, [0, 0])])
def test_perfect_constant_and_inverted_classifiers(score, auc, interval):
    labels = np.repeat([0, 1, 2], 20)
    curves = compute_curves(labels, score * np.eye(3)[labels], np.arange(60), CLASSES)
    for found in curves['per_class'].values():
        assert (found['auc'], found['auc_interval']) == (auc, interval)
    assert (curves['macro_auc'], curves['macro_auc_interval']) == (auc, interval)
    if score == 1:
        assert curves['macro_average_precision'] == 1


def test_long_curves_are_thinned_between_their_ends():
    labels, p, patients = draw(5000, 0)
    curves = compute_curves(labels, p, patients, CLASSES)
    for i, name in enumerate(CLASSES):
        roc, pr = (curves['per_class'][name][key] for key in ('roc', 'precision_recall'))
        assert len(roc['fpr']) <= MAX_POINTS
        assert len(pr['recall']) <= MAX_POINTS
        assert (roc['fpr'][0], roc['tpr'][0], roc['fpr'][-1], roc['tpr'][-1]) == (0, 0, 1, 1)
        assert (pr['recall'][0], pr['precision'][0], pr['recall'][-1]) == (0, 1, 1)
        assert pr['precision'][-1] == precision_recall_curve(labels == i, p[:, i])[0][0]
        assert auc(roc['fpr'], roc['tpr']) == pytest.approx(curves['per_class'][name]['auc'], abs=2e-3)


def test_thinned_points_are_even_along_the_curve():
    position = np.concatenate([np.zeros(1000), np.linspace(0, 1, 1000) ** 3])
    chosen = thin(position, 11)
    assert (chosen[0], chosen[-1]) == (0, 1999)
    np.testing.assert_allclose(position[chosen], np.linspace(0, 1, 11), atol=0.005)
    np.testing.assert_array_equal(thin(np.arange(5), 5), np.arange(5))


def test_missing_class_is_stated():
    labels, p, patients = draw(60, 0)
    labels[labels == 2] = 1
    curves = compute_curves(labels, p, patients, CLASSES)
    covid19 = curves['per_class']['covid19']
    assert covid19['note'] == 'No example is covid19.'
    assert (covid19['auc'], covid19['roc'], covid19['average_precision_interval']) == (None, None, None)
    assert (covid19['num_positive'], covid19['num_negative']) == (0, 60)
    assert curves['macro_auc'] == pytest.approx(np.mean([curves['per_class'][c]['auc'] for c in CLASSES[:2]]))
    assert curves['note'] == 'The macro averages leave out covid19.'
    json.dumps(curves, allow_nan=False)


@pytest.mark.parametrize('count', [0, 4])
def test_one_class_or_none_leaves_nothing(count):
    curves = compute_curves(np.zeros(count, int), np.ones((count, 3)) / 3, list('abcd')[:count], CLASSES)
    assert curves['per_class']['normal']['note'] == ('Every example is normal.' if count else 'No example is normal.')
    assert (curves['macro_auc'], curves['macro_auc_interval']) == (None, None)


def test_area_of_clustered_examples_is_covered_by_patient_and_missed_by_slice():
    # 100 studies of 40 patients with 5 slices each. A score is a patient effect N(+-0.5, 1) plus noise N(0, 0.3^2).
    rng = np.random.default_rng(0)
    patients, positive = np.repeat(np.arange(40), 5), np.repeat(np.arange(40) % 2 == 1, 5)
    truth = 0.7536  # P(z > -1 / sqrt(2 * 1.09)), z standard normal: the difference of a pair is N(1, 2 * 1.09)
    covered = {'patient': 0, 'slice': 0}
    for study in range(100):
        scores = positive - 0.5 + rng.normal(size=40)[patients] + 0.3 * rng.normal(size=200)
        for unit, groups in (('patient', patients), ('slice', np.arange(200))):
            low, high = compute_ranking(scores, positive, groups, seed=study)['auc_interval']
            covered[unit] += low <= truth <= high
    assert covered['patient'] >= 88
    assert covered['slice'] <= 70
