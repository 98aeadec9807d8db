import types

import numpy as np
import pytest

from covidjax.data.lists import Row
from covidjax.data.sequences import group_scans
from covidjax.errors import UserError
from covidjax.evaluation.sick import Found, compute_sick
from covidjax.experiment import sick

# Lesions of a slice in hundredths of its lungs, by scan.
TRAIN = {0: [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 2)], 2: [(0, 10, 20, 0, 0), (0, 0, 30), (50,)]}


def make_rows(scans):
    """Returns the rows of a split, and what is found in its slices."""
    rows, lesions = [], []
    for label, of_class in scans.items():
        for number, shares in enumerate(of_class):
            name = f'{label}-{number}'
            rows += [Row(f'{name}_{i}.png', label, (0, 0, 9, 9), name, name, i) for i in range(len(shares))]
            lesions += shares
    return rows, Found(np.full(len(lesions), 100.0), np.array(lesions, float), np.array(lesions) / 200)


@pytest.fixture
def judge(monkeypatch):
    rows, found = make_rows(TRAIN)
    monkeypatch.setattr(sick, 'measure_split', lambda lesions, data, split: found)
    return sick.Judge(
        types.SimpleNamespace(name='box', digest='d', threshold=0.5), types.SimpleNamespace(rows={'train': rows})
    )


def test_a_scan_is_judged_by_all_its_slices(judge):
    scans = group_scans(make_rows(TRAIN)[0])
    # The share of the lungs of the scan, that of the worst fifth, which is one slice of up to five, and its peak.
    features = [
        (0, 0, 0),
        (0.002, 0.01, 0.005),
        (2 / 300, 0.02, 0.01),
        (0.06, 0.2, 0.1),
        (0.1, 0.3, 0.15),
        (0.5, 0.5, 0.25),
    ]
    np.testing.assert_allclose(judge.compute_scan_sick(scans, 'train'), compute_sick(judge.rule, np.array(features)))
    assert (judge.compute_scan_sick(scans, 'train') > 0.5).tolist() == [False] * 3 + [True] * 3
    single = compute_sick(judge.rule, np.array([[0.02, 0.02, 0.01], [0.1, 0.1, 0.05]]))
    np.testing.assert_allclose(judge.compute_slice_sick('train')[[12, 14]], single)
    described = judge.describe(1.5)
    assert {'weights': described['weights'], 'bias': described['bias']} == judge.rule._asdict()
    assert described['classifier_temperature'] == 1.5


@pytest.mark.parametrize('label', [0, 2])
def test_a_training_list_of_one_side_is_refused(label):
    rows, _ = make_rows({label: TRAIN[label]})
    with pytest.raises(UserError, match='needs sick and normal training scans') as caught:
        sick.Judge(types.SimpleNamespace(), types.SimpleNamespace(rows={'train': rows}))
    assert '\n' not in str(caught.value)


def test_no_lesions_no_judge():
    assert sick.create_judge('', None) is None


def test_classifier_lesions_and_both_are_compared():
    rows, _ = make_rows({0: [(0,), (0,)], 1: [(0,)], 2: [(0,)]})
    classifier = np.log([[0.8, 0.1, 0.1], [0.2, 0.4, 0.4], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
    found = types.SimpleNamespace(classifier=classifier, sick=np.array([0.1, 0.2, 0.9, 0.8]))
    compared = sick.compare_splits({'val': rows, 'test': rows}, {'val': found, 'test': found})
    assert list(compared) == ['val', 'test']
    of_test = compared['test']
    assert {name: one['sick_auc'] for name, one in of_test.items()} == {'classifier': 0.75, 'lesions': 1, 'both': 1}
    assert of_test['classifier']['accuracy'] == 0.5
    assert of_test['both']['accuracy'] == 1
    assert 'accuracy' not in of_test['lesions']  # which know two classes
    lines = '\n'.join(sick.format_verdicts(compared))
    assert lines.count('1.000') >= 4
    assert 'test lesions    AUC of sick 1.000' in lines
    columns = sick.create_columns(found)
    np.testing.assert_allclose(columns['classifier_covid19'], [0.1, 0.4, 0.1, 0.7])
    assert columns['sick'].tolist() == [0.1, 0.2, 0.9, 0.8]
