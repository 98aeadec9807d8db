import json

import numpy as np
import pytest

from covidjax.data.lists import CLASSES
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.external import Side, compare_sides, correct_to_own_shares, refit
from covidjax.evaluation.screening import fit_rules


def make_side(count, strength, seed, labels=(0, 1, 2), prefix='p'):
    rng = np.random.default_rng(seed)
    label_N = rng.choice(labels, count)
    logits = rng.normal(size=(count, 3)) + strength * np.eye(3)[label_N]
    return Side(label_N, logits, [f'{prefix}{i // 2}' for i in range(count)], None, [])


@pytest.fixture(scope='module')
def rules():
    side = make_side(400, 3, 0)
    return fit_rules(side.logits, side.labels, side.patients, CLASSES)


def test_what_got_worse_is_seen_and_the_same_is_not(rules):
    inside = make_side(400, 3, 1)
    same = compare_sides(inside, make_side(400, 3, 2), rules, CLASSES)
    worse = compare_sides(inside, make_side(400, 1, 3), rules, CLASSES)
    json.dumps(worse, allow_nan=False)
    keys = ('accuracy', 'auc_covid19', 'sensitivity_covid19', 'coverage')
    for key in keys:
        low, high = same['scores'][key]['interval']
        assert low <= 0 <= high
        assert worse['scores'][key]['interval'][1] < 0
        assert worse['scores'][key]['difference'] == pytest.approx(
            worse['scores'][key]['outside']['value'] - worse['scores'][key]['inside']['value']
        )
    for key in ('brier', 'nll', 'ece'):
        assert worse['scores'][key]['interval'][0] > 0
    assert all(score['note'] == '' for key, score in worse['scores'].items() if key != 'unusual')
    assert worse['scores']['unusual']['note'] == 'not measured inside and outside'


def test_an_absent_class_is_stated_and_compared_with_nothing(rules):
    inside, outside = make_side(400, 3, 1), make_side(200, 3, 2, labels=(0, 2))
    found = compare_sides(inside, outside, rules, CLASSES)
    assert found['classes'] == ['normal', 'covid19']
    assert found['absent'] == ['pneumonia']
    assert found['num_examples'] == {'inside': int((inside.labels != 1).sum()), 'outside': 200}
    for key in ('recall_pneumonia', 'auc_pneumonia', 'coverage_pneumonia'):
        assert found['scores'][key]['note'] == 'no pneumonia in these data'
        assert found['scores'][key]['difference'] is None
    kept = inside.labels != 1
    right = (inside.logits.argmax(1) == inside.labels)[kept].mean()
    assert found['scores']['accuracy']['inside']['value'] == pytest.approx(right)
    assert found['scores']['specificity_disease']['note'] == ''


@pytest.mark.parametrize(
    ('labels', 'notes'),
    [
        (
            (0,),
            {
                'sensitivity_covid19': 'no covid19 in these data',
                'sensitivity_disease': 'no disease in these data',
                'auc_normal': 'only normal in these data',
            },
        ),
        (
            (2,),
            {'specificity_covid19': 'only covid19 in these data', 'specificity_disease': 'only disease in these data'},
        ),
    ],
)
def test_a_single_class(rules, labels, notes):
    found = compare_sides(make_side(400, 3, 1), make_side(60, 3, 2, labels=labels), rules, CLASSES)
    assert {key: found['scores'][key]['note'] for key in notes} == notes
    assert found['scores']['accuracy']['note'] == ''


def test_a_class_that_only_outside_has(rules):
    found = compare_sides(make_side(400, 3, 1, labels=(0, 2)), make_side(200, 3, 2), rules, CLASSES)
    assert found['absent'] == []
    assert found['absent_inside'] == ['pneumonia']
    assert found['scores']['recall_pneumonia']['note'] == 'no pneumonia in the test list of the run'


def test_unusual_slices_have_patients_of_their_own(rules):
    inside = make_side(40, 3, 1)._replace(unusual=np.zeros(30, bool), slice_patients=[f'p{i}' for i in range(30)])
    outside = make_side(40, 3, 2)._replace(unusual=np.arange(60) % 2 == 0, slice_patients=[f'q{i}' for i in range(60)])
    score = compare_sides(inside, outside, rules, CLASSES)['scores']['unusual']
    assert (score['inside']['value'], score['outside']['value'], score['difference']) == (0, 0.5, 0.5)
    assert 0.3 < score['interval'][0] < 0.5 < score['interval'][1] < 0.7


def test_refitting_undoes_a_wrong_temperature():
    side = make_side(3000, 2, 5)  # the logits of three unit normals, shifted by 2, are calibrated as they are times 2
    found = refit(side._replace(logits=4 * side.logits), 1.0)
    again = refit(side, 1.0)
    assert found['fitted_temperature'] == pytest.approx(4 * again['fitted_temperature'], rel=1e-3)
    assert found['after']['ece']['value'] < 0.03 < found['before']['ece']['value']
    assert found['after']['nll']['value'] < found['before']['nll']['value']


def test_correction_to_own_shares_helps_where_classes_are_rare():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 2000, p=[0.9, 0.05, 0.05])
    logits = 2 * (rng.normal(size=(2000, 3)) + 1.5 * np.eye(3)[labels])
    side = Side(labels, logits, [str(i) for i in range(2000)], None, [])
    found = correct_to_own_shares(side, 1.0, CLASSES)
    assert found['shares']['normal'] == pytest.approx(((labels == 0).sum() + 1) / 2003)
    assert found['difference']['accuracy']['interval'][0] > 0
    # An absent class keeps a small share and raises nothing.
    absent = correct_to_own_shares(make_side(60, 2, 1, labels=(0, 2)), 1.0, CLASSES)
    assert absent['shares']['pneumonia'] == pytest.approx(1 / 63)
    np.testing.assert_allclose(sum(absent['shares'].values()), 1)


def test_calibrated_scores_use_the_temperature_of_the_run(rules):
    side = make_side(100, 3, 1)
    found = compare_sides(side, side, rules, CLASSES)['scores']['nll']['inside']['value']
    p = apply_temperature(side.logits, rules['temperature'])
    assert found == pytest.approx(-np.log(p[np.arange(100), side.labels]).mean())
