import json

import numpy as np
import pytest

from covidjax.data.lists import CLASSES, read_lists, read_metadata
from covidjax.evaluation.subgroups import (
    MIN_PATIENTS,
    compute_subgroups,
    name_group,
    name_slices,
    name_thickness,
    read_columns,
)

THRESHOLDS = {'covid19': 0.5, 'disease': 0.5}


def plant(rng, groups, accuracies):
    """Returns labels and probabilities [N, 3], of which a known share is right in each group."""
    labels = rng.integers(0, 3, len(groups))
    called = labels.copy()
    for group, accuracy in accuracies.items():
        members = np.flatnonzero(groups == group)
        wrong = members[: round((1 - accuracy) * len(members))]
        called[wrong] = (labels[wrong] + 1) % 3
    return labels, 0.1 + 0.7 * np.eye(3)[called]


def test_a_planted_gap_is_found():
    rng = np.random.default_rng(0)
    groups = np.repeat(['a', 'b', 'c', 'few'], [100, 100, 100, MIN_PATIENTS - 1])
    labels, probabilities = plant(rng, groups, {'a': 0.95, 'b': 0.85, 'c': 0.65, 'few': 0.0})
    patients = [f'p{i}' for i in range(len(groups))]
    columns = {'source': groups.tolist(), 'country': ['not given'] * len(groups)}
    found = compute_subgroups(columns, labels, probabilities, patients, CLASSES, THRESHOLDS)
    assert list(found['columns']) == ['source']
    by_name = {group['group']: group for group in found['columns']['source']['groups']}
    assert {name: by_name[name]['scores']['accuracy']['value'] for name in 'abc'} == pytest.approx(
        {'a': 0.95, 'b': 0.85, 'c': 0.65}
    )
    assert by_name['few'] == {'group': 'few', 'num_patients': 19, 'num_examples': 19, 'scores': None}
    gap = found['columns']['source']['gaps']['accuracy']
    assert (gap['highest'], gap['lowest']) == ('a', 'c')
    assert gap['difference'] == pytest.approx(0.3)
    # The normal approximation of two independent shares gives 0.3 +- 1.96 * 0.0524.
    np.testing.assert_allclose(gap['interval'], [0.197, 0.403], atol=0.02)
    json.dumps(found, allow_nan=False)


def test_sensitivity_is_at_the_threshold_and_auc_is_not():
    labels = np.array([2, 0] * 30)
    probabilities = np.where(labels[:, None] == 2, [[0.5, 0.1, 0.4]], [[0.8, 0.1, 0.1]])
    patients = [f'p{i}' for i in range(60)]
    for threshold, expected in ((0.41, 0), (0.4, 1), (None, None)):
        found = compute_subgroups(
            {'sex': ['female'] * 60},
            labels,
            probabilities,
            patients,
            CLASSES,
            {'covid19': threshold, 'disease': 0.5},
        )
        scores = found['columns']['sex']['groups'][0]['scores']
        assert scores['sensitivity_covid19']['value'] == expected
        assert scores['auc_covid19']['value'] == 1
        assert found['columns']['sex']['gaps'] == dict.fromkeys(scores)  # a single group


def test_an_unknown_group_is_scored_and_makes_no_gap():
    labels = np.zeros(75, int)
    groups = np.repeat(['male', 'female', 'not given'], 25)
    right = np.where(groups == 'not given', 1, 0)
    probabilities = np.eye(3)[right]
    found = compute_subgroups(
        {'sex': groups.tolist()}, labels, probabilities, [str(i) for i in range(75)], CLASSES, THRESHOLDS
    )['columns']['sex']
    assert [group['group'] for group in found['groups']] == ['female', 'male', 'not given']
    assert found['groups'][2]['scores']['accuracy']['value'] == 0
    assert found['gaps']['accuracy']['difference'] == 0


def test_names_of_groups():
    assert name_group('age', '59.5') == '40-59'
    assert name_group('age', 'sixty') == 'not a number'
    assert [name_group('sex', text) for text in ('M', 'f', 'Female', ' ', None)] == [
        'male',
        'female',
        'female',
        'not given',
        'not given',
    ]
    assert [name_slices(n) for n in (1, 2, 15, 16, 49, 50, 149, 150)] == [
        '1',
        '2-15',
        '2-15',
        '16-49',
        '16-49',
        '50-149',
        '50-149',
        '150 or more',
    ]
    assert [name_thickness(mm) for mm in (None, 1.5, 2.0, 5.0)] == [
        'not given',
        'up to 1.5 mm',
        '1.5 to 3.5 mm',
        'above 3.5 mm',
    ]


def test_a_damaged_metadata_file_gives_no_groups(tmp_path, caplog):
    (tmp_path / 'metadata.csv').write_text('no,such,column\n1,2,3\n')
    columns = read_columns(tmp_path, [], [])
    assert 'no subgroups by metadata.csv' in caplog.text
    assert columns['sex'] == []


def test_public_metadata_shows_a_planted_gap(real_data, tmp_path):
    folder = real_data / 'covidx_lists'
    name = 'val_COVIDx_CT-2A.txt'
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / 'metadata.csv').write_bytes((folder / 'metadata.csv').read_bytes())
    rows = read_lists(str(tmp_path), ['val'])['val'][::10]
    metadata = read_metadata(str(tmp_path / 'metadata.csv'))
    columns = read_columns(tmp_path, rows, rows)
    # Every second patient from Iran is called wrongly, and nobody else.
    iranian = sorted({row.patient for row in rows if metadata.get(row.patient, {}).get('country') == 'Iran'})
    assert len(iranian) >= MIN_PATIENTS
    wrong = set(iranian[::2])
    labels = np.array([row.label for row in rows])
    called = np.where([row.patient in wrong for row in rows], (labels + 1) % 3, labels)
    found = compute_subgroups(
        columns, labels, 0.1 + 0.7 * np.eye(3)[called], [row.patient for row in rows], CLASSES, THRESHOLDS
    )['columns']
    gap = found['country']['gaps']['accuracy']
    assert gap['lowest'] == 'Iran'
    low, high = gap['interval']
    assert 0.2 < low < 0.5 < high < 0.8
    assert {'source', 'country', 'number of slices'} <= set(found)
