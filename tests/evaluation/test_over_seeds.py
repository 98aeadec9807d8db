import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from covidjax.evaluation.metrics import compute_ranking, draw_resamples
from covidjax.evaluation.over_seeds import Estimate, average, estimate_auc, estimate_mean, subtract, summarise

GROUPS = np.array([0, 0, 1, 2])
RESAMPLES = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]])


def test_mean_by_hand():
    values = np.array([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    estimate = estimate_mean(values, GROUPS, RESAMPLES)
    np.testing.assert_allclose(estimate.by_seed, [0.5, 1.0])
    # Means over the seeds are 1, 0.5, 1 and 0.5. The second resample holds patient 0 twice.
    np.testing.assert_allclose(estimate.resampled, [0.75, (2 * 1.5 + 1) / 5, 0.5])


def test_mean_of_patients_without_examples():
    estimate = estimate_mean(np.ones((1, 2)), np.array([0, 0]), RESAMPLES)
    np.testing.assert_allclose(estimate.resampled, [1, 1, np.nan])


def test_auc_by_hand():
    scores = np.array([[0.9, 0.2, 0.2, 0.1]])
    positive = np.array([True, True, False, False])
    estimate = estimate_auc(scores, positive, GROUPS, RESAMPLES)
    np.testing.assert_allclose(estimate.by_seed, [3.5 / 4])
    # Patients 0, 0, 1: the only negative is 0.2. Patient 2 alone has no positive.
    np.testing.assert_allclose(estimate.resampled, [3.5 / 4, 0.75, np.nan])


def test_auc_equals_scikit_learns_and_ours_over_patients():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 10, (2, 40)) / 10, rng.random(40) < 0.4
    resamples = draw_resamples(40, seed=0)
    estimate = estimate_auc(scores, positive, np.arange(40), resamples)
    np.testing.assert_allclose(estimate.by_seed, [roc_auc_score(positive, one) for one in scores])
    single = summarise(estimate_auc(scores[:1], positive, np.arange(40), resamples))
    expected = compute_ranking(scores[0], positive, np.arange(40))
    assert single['mean'] == pytest.approx(expected['auc'])
    assert single['over_patients'] == pytest.approx(expected['auc_interval'])


def test_summary_by_hand():
    summary = summarise(Estimate(np.array([0.7, 0.8, 0.9]), np.linspace(0, 1, 1001)))
    margin = 4.302653 * 0.1 / np.sqrt(3)  # Student's t of two degrees of freedom
    assert summary['mean'] == pytest.approx(0.8)
    assert summary['over_seeds'] == pytest.approx([0.8 - margin, 0.8 + margin])
    assert summary['over_patients'] == pytest.approx([0.025, 0.975])
    assert summary['by_seed'] == [0.7, 0.8, 0.9]


def test_one_seed_has_no_interval_over_seeds():
    summary = summarise(Estimate(np.array([0.7]), np.array([np.nan, np.nan])))
    assert summary == {'mean': 0.7, 'by_seed': [0.7], 'over_seeds': None, 'over_patients': None}


def test_average_and_difference():
    first = Estimate(np.array([1.0, 2.0]), np.array([3.0]))
    second = Estimate(np.array([0.0, 4.0]), np.array([1.0]))
    for estimate, by_seed, resampled in (
        (average([first, second]), [0.5, 3.0], [2.0]),
        (subtract(first, second), [1.0, -2.0], [2.0]),
    ):
        np.testing.assert_allclose(estimate.by_seed, by_seed)
        np.testing.assert_allclose(estimate.resampled, resampled)
