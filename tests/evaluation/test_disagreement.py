import numpy as np
import pytest

from covidjax.evaluation.disagreement import compute_disagreement, fit_limit


def test_by_hand():
    certain = np.array([[[1.0, 0, 0]], [[0, 1.0, 0]], [[1.0, 0, 0]]])
    # Pairs: 1 apart, equal, 1 apart.
    assert compute_disagreement(certain) == pytest.approx([2 / 3])
    assert compute_disagreement(certain[::2]) == pytest.approx([0])
    assert compute_disagreement(np.array([[[0.5, 0.3, 0.2]], [[0.2, 0.3, 0.5]]])) == pytest.approx([0.3])


def test_more_members_do_not_change_its_mean():
    p = np.random.default_rng(0).dirichlet(np.ones(3), (6, 4000))
    assert compute_disagreement(p[:2]).mean() == pytest.approx(compute_disagreement(p).mean(), abs=0.01)


def test_a_new_example_exceeds_the_limit_in_at_most_one_of_five():
    rng = np.random.default_rng(0)
    beyond = [
        rng.random() > fit_limit(rng.random(count), [str(i) for i in range(count)])['limit']
        for count in (4, 10, 60)
        for _ in range(2000)
    ]
    assert 0.16 < np.mean(beyond) < 0.205


def test_the_rank_and_too_few_examples():
    found = fit_limit(np.arange(19.0), ['a'] * 19)
    assert found['limit'] == 15
    assert 'on the 19 out-of-fold' in found['rule']
    assert fit_limit(np.arange(39.0), ['a', 'b', 'c'] * 13)['limit'] == 31
    few = fit_limit(np.arange(3.0), ['a'] * 3)
    assert few['limit'] is None
    assert '3 out-of-fold examples are too few' in few['note']
    assert fit_limit(np.empty(0), [])['limit'] is None
