import numpy as np
import pytest

from covidjax.evaluation.label_errors import describe_label_errors, find_suspects

P = np.array(
    [
        [0.9, 0.05, 0.05],
        [0.7, 0.2, 0.1],
        [0.1, 0.8, 0.1],  # labelled 0: wrong
        [0.2, 0.7, 0.1],
        [0.1, 0.9, 0.0],
        [0.1, 0.45, 0.45],  # labelled 1, and the most probable class is 1
        [0.1, 0.1, 0.8],
        [0.4, 0.0, 0.6],
    ]
)
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2])


def test_by_hand():
    found = find_suspects(P, LABELS)
    thresholds = [(0.9 + 0.7 + 0.1) / 3, (0.7 + 0.9 + 0.45) / 3, (0.8 + 0.6) / 2]
    np.testing.assert_allclose(found.thresholds, thresholds)
    assert found.places.tolist() == [2]
    assert found.suggested.tolist() == [1]
    assert found.margins == pytest.approx([0.1 - 0.8])
    # Rows 5 and 7 reach no threshold.
    assert found.joint.tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 1]]


def test_a_class_that_is_absent_is_never_suggested():
    labels = np.where(LABELS == 2, 1, LABELS)
    found = find_suspects(P, labels)
    assert np.isnan(found.thresholds[2])
    assert 2 not in found.suggested
    assert found.joint[:, 2].sum() == 0


def test_flipped_labels_are_found():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 2000)
    p = rng.dirichlet(np.ones(3), 2000)
    p = 0.6 * np.eye(3)[true] + 0.4 * p
    flipped = rng.random(2000) < 0.03
    labels = np.where(flipped, (true + 1) % 3, true)
    places = find_suspects(p, labels).places
    hits = flipped[places].sum()
    assert hits / len(places) == 1  # every clean example has its own class on top
    assert hits / flipped.sum() > 0.5  # the other suggested classes do not reach their threshold
    assert find_suspects(p, true).places.tolist() == []
    noisy = 0.4 * np.eye(3)[true] + 0.6 * rng.dirichlet(np.ones(3), 2000)
    places = find_suspects(noisy, labels).places
    assert flipped[places[:10]].mean() > 0.8  # the most suspicious come first


def test_scans_have_the_mean_of_their_slices_and_are_shown_by_their_clearest():
    p = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.05, 0.95, 0], [0.3, 0.7, 0], [0.8, 0.2, 0], [0, 0, 1.0]])
    labels = np.array([0, 0, 0, 1, 0, 2])
    scans = ['a', 'b', 'b', 'c', 'd', 'e']
    found = describe_label_errors(p, labels, list('uvwxyz'), list('PQQRST'), scans)
    assert [s['name'] for s in found['slices']['suspects']] == ['w', 'v']
    [suspect] = found['scans']['suspects']
    expected = {'name': 'b', 'patient': 'Q', 'label': 'normal', 'suggested': 'pneumonia', 'shown': 2}
    assert {key: suspect[key] for key in expected} == expected
    assert suspect['margin'] == pytest.approx(0.125 - 0.875)
    assert found['scans']['num_examples'] == 5
    assert found['scans']['thresholds']['normal'] == pytest.approx((0.9 + 0.125 + 0.8) / 3)
    only = describe_label_errors(p, labels, scans, list('PQQRST'), None)
    assert list(only) == ['scans']
