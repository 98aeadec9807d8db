import numpy as np
import pytest
from scipy.stats import binomtest

from covidjax.evaluation.voting import RULES, choose_rule, compare_paired, find_conflicts, vote

SCAN = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.0, 0.1, 0.9]])


@pytest.mark.parametrize(
    ('rule', 'expected'),
    [
        ('mean', [1.1 / 3, 0.8 / 3, 1.1 / 3]),
        ('max', [0.6, 0.4, 0.9]),
        ('top-2', [0.55, 0.35, 0.5]),
        ('top-5', [1.1 / 3, 0.8 / 3, 1.1 / 3]),  # fewer slices than k: all of them
    ],
)
def test_rules_by_hand(rule, expected):
    np.testing.assert_allclose(vote(SCAN, rule), expected)


def test_majority_counts_slices_and_breaks_ties_by_the_mean():
    assert vote(SCAN, 'majority').argmax() == 0  # two slices against one
    tie = np.array([[0.6, 0.4, 0.0], [0.1, 0.9, 0.0]])
    assert vote(tie, 'majority').argmax() == 1  # one each, mean 0.35 against 0.65
    np.testing.assert_allclose(vote(SCAN, 'majority').sum(), 1)


@pytest.mark.parametrize('rule', RULES)
def test_one_slice_votes_for_itself(rule):
    assert vote(np.array([[0.2, 0.5, 0.3]]), rule).argmax() == 1


def test_unknown_rule():
    with pytest.raises(ValueError, match="'median'"):
        vote(SCAN, 'median')


def test_rule_is_chosen_by_validation_accuracy():
    # Each scan has two normal slices and one clear COVID-19 slice: only 'max' calls COVID-19.
    scans = [np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.05, 0.05, 0.9]])] * 4
    rule, accuracies = choose_rule(scans, np.array([2, 2, 2, 2]))
    assert rule == 'max'
    assert accuracies['max'] == 1
    assert accuracies['mean'] == 0
    assert choose_rule(scans, np.array([0, 0, 0, 0]))[0] == 'mean'  # the first of tied rules


def test_paired_comparison_by_hand():
    labels = np.zeros(10, int)
    first = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])  # 7 right
    second = np.array([0, 0, 1, 1, 1, 1, 1, 0, 1, 1])  # 3 right, one of which the first gets wrong
    result = compare_paired(first, second, labels, [str(i) for i in range(10)])
    assert result['difference'] == pytest.approx(0.4)
    assert (result['only_first'], result['only_second']) == (5, 1)
    assert result['mcnemar_p'] == pytest.approx(14 / 64)  # two-sided: 2 * (1 + 6) / 2**6
    assert result['mcnemar_p'] == pytest.approx(binomtest(5, 6).pvalue)
    assert result['interval'][0] < 0.4 < result['interval'][1]


def test_paired_comparison_of_equals():
    labels = np.array([0, 1, 2])
    result = compare_paired(labels, labels, labels, ['a', 'b', 'c'])
    assert result == {'difference': 0, 'interval': [0, 0], 'only_first': 0, 'only_second': 0, 'mcnemar_p': 1.0}


def test_conflict_is_pneumonia_beside_covid19():
    normal, pneumonia, covid19 = np.eye(3)
    scans = [np.stack(s) for s in ([normal, pneumonia], [pneumonia, covid19, normal], [covid19], [normal, covid19])]
    assert find_conflicts(scans).tolist() == [False, True, False, False]
