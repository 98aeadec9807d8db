import numpy as np
import pytest

from covidjax.evaluation.left_out import describe_score, score_sick, subtract_scores
from covidjax.evaluation.metrics import compute_wilson_interval

PATIENTS = np.array(['a', 'a', 'b', 'c', 'd'])


def test_both_classes_are_scored_by_auc():
    scores = np.array([[0.1, 0.6, 0.2, 0.5, 0.9], [0.9, 0.8, 0.1, 0.2, 0.3]])
    is_sick = np.array([False, False, False, True, True])
    found = score_sick(scores, scores > 0.5, is_sick, PATIENTS)
    assert (found.kind, found.num_patients) == ('AUC', 4)
    assert found.estimate.by_seed == pytest.approx([5 / 6, 2 / 6])
    assert describe_score(found) == {'kind': 'AUC', 'value': pytest.approx(7 / 12), 'interval': None}  # two of a class
    rng = np.random.default_rng(0)
    is_sick, scores = np.arange(40) % 2 == 0, rng.random((1, 40))
    low, high = describe_score(score_sick(scores, scores > 0.5, is_sick, np.arange(40)))['interval']
    assert low < describe_score(score_sick(scores, scores > 0.5, is_sick, np.arange(40)))['value'] < high


@pytest.mark.parametrize(('sick', 'kind', 'share'), [(True, 'sensitivity', 0.4), (False, 'specificity', 0.6)])
def test_one_class_is_scored_by_its_calls(sick, kind, share):
    calls = np.array([[True, False, True, False, False]])
    found = score_sick(calls.astype(float), calls, np.full(5, sick), PATIENTS)
    assert found.kind == kind
    assert found.estimate.by_seed == pytest.approx([share])
    assert describe_score(found)['interval'] is None  # four patients
    sure = describe_score(score_sick(np.ones((1, 8)), np.ones((1, 8), bool), np.ones(8, bool), np.arange(8)))
    assert sure['value'] == 1
    assert sure['interval'] == compute_wilson_interval(8, 8)


def test_differences_are_paired_by_patient():
    rng = np.random.default_rng(0)
    patients, is_sick = np.arange(80), np.arange(80) % 2 == 0
    scores = is_sick + rng.normal(size=80)
    first = score_sick(scores[np.newaxis], scores[np.newaxis] > 0.5, is_sick, patients)
    second = score_sick(scores[np.newaxis] - 0.01, scores[np.newaxis] > 0.5, is_sick, patients)
    assert subtract_scores(first, second) == {'kind': 'AUC', 'value': 0.0, 'interval': [0.0, 0.0]}
    worse = score_sick(rng.normal(size=(1, 80)), scores[np.newaxis] > 0.5, is_sick, patients)
    difference = subtract_scores(worse, first)
    assert difference['value'] < 0
    assert difference['interval'][1] < 0


def test_no_example():
    assert score_sick(np.empty((2, 0)), np.empty((2, 0), bool), np.empty(0, bool), np.empty(0, str)) is None
    assert describe_score(None) is None
