import numpy as np
import pytest

from covidjax.evaluation.left_out import describe_score, score_sick, subtract_scores

PATIENTS = np.array(['a', 'a', 'b', 'c', 'd'])


def test_both_classes_are_scored_by_auc():
    scores = np.array([[0.1, 0.6, 0.2, 0.5, 0.9], [0.9, 0.8, 0.1, 0.2, 0.3]])
    is_sick = np.array([False, False, False, True, True])
    kind, estimate = score_sick(scores, scores > 0.5, is_sick, PATIENTS)
    assert kind == 'AUC'
    assert estimate.by_seed == pytest.approx([5 / 6, 2 / 6])
    described = describe_score((kind, estimate))
    assert described['value'] == pytest.approx(7 / 12)
    assert described['interval'][0] < 7 / 12 < described['interval'][1]


@pytest.mark.parametrize(('sick', 'kind', 'share'), [(True, 'sensitivity', 0.4), (False, 'specificity', 0.6)])
def test_one_class_is_scored_by_its_calls(sick, kind, share):
    calls = np.array([[True, False, True, False, False]])
    found = score_sick(calls.astype(float), calls, np.full(5, sick), PATIENTS)
    assert found[0] == kind
    assert found[1].by_seed == pytest.approx([share])


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
