import numpy as np
import pytest

from covidjax.evaluation.patient_level import compute_patient_level, compute_patient_scores, format_comparison


def test_by_hand():
    # Pneumonia: a scores (-0.8 + 0.2) / 2 < 0, right. COVID-19: b scores -0.1, wrong; c scores 0.6, right.
    labels = np.array([1, 1, 2, 2, 0])
    patients = ['a', 'a', 'b', 'c', 'n']
    scores = np.array([[0, 0.9, 0.1], [0, 0.4, 0.6], [0.1, 0.5, 0.4], [0, 0.2, 0.8], [0, 0, 1]])
    result = compute_patient_level(scores, labels, patients)
    assert result['accuracy'] == pytest.approx(2 / 3)
    assert result['auc'] == 1.0  # b (-0.1) still above a (-0.3)
    assert (result['num_pneumonia'], result['num_covid19']) == (1, 2)


def test_patient_scores_by_hand():
    labels = np.array([2, 1, 0, 2, 1])
    scores = np.array([[0, 0.1, 0.9], [0, 0.7, 0.3], [1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])
    score, is_covid19, patients = compute_patient_scores(scores, labels, ['a/1', 'b', 'n', 'a/1', 'a/1'])
    np.testing.assert_allclose(score, [0, -0.4, 0.4])  # patient a/1 has slices of both classes
    assert is_covid19.tolist() == [False, False, True]
    assert patients == ['a/1', 'b', 'a/1']


def test_no_sick_patients():
    result = compute_patient_level(np.ones((2, 3)), np.zeros(2, int), ['a', 'b'])
    assert result['accuracy'] is None
    assert '-' in format_comparison({'model': result})


def test_constant_scores_are_ties():
    labels = np.repeat([1, 2], [7, 11])
    result = compute_patient_level(
        np.tile([0.1, 0.2, 0.7], (18, 1)), labels, ['a'] * 2 + ['b'] * 5 + ['c'] * 3 + ['d'] * 8
    )
    assert (result['auc'], result['auc_interval']) == (0.5, [0.5, 0.5])
