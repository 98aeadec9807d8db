import numpy as np
import pytest

from covidjax.explain import catalogue, leading

PATIENTS = [f'p{i}' for i in range(40)]


def make_scores(**offsets):
    """Returns pointing and area under ROC of 40 slices: noise about 0.5, plus an offset by name."""
    rng = np.random.default_rng(0)
    controls = ['no preference', 'no preference, inside the lungs', 'always the centre', catalogue.SMOOTH_GREY]
    controls[-1] += catalogue.IN_LUNGS
    names = [*offsets, *controls]
    return {name: rng.normal(0.5 + offsets.get(name, 0), 0.1, (40, 2)) for name in names}


def test_the_best_map_leads_if_it_beats_chance():
    scores = make_scores(good=0.2, bad=-0.2)
    assert leading.choose_map(scores, 'lesions') == 'good'
    lead = leading.measure_lead(scores, 'good', 'lesions', PATIENTS)
    assert lead['name'] == lead['best'] == 'good'
    assert lead['margins']['chance']['auc']['mean'] == pytest.approx(0.2, abs=0.05)
    assert lead['margins']['chance']['auc']['interval'][0] > 0.1
    assert (lead['num_slices'], lead['num_patients']) == (40, 40)


def test_no_map_leads_if_the_best_is_chance():
    lead = leading.measure_lead(make_scores(best=0.0), 'best', 'lesions', PATIENTS)
    assert lead['name'] is None
    assert lead['best'] == 'best'


def test_both_measures_must_beat_chance():
    scores = make_scores(best=0.2)
    scores['best'][:, 0] = scores['no preference'][:, 0]
    assert leading.measure_lead(scores, 'best', 'lesions', PATIENTS)['name'] is None


def test_a_single_patient_has_no_interval_and_no_lead():
    assert leading.measure_lead(make_scores(good=0.3), 'good', 'lesions', ['p'] * 40)['name'] is None


def test_chance_inside_the_lungs_is_inside_the_lungs():
    name = 'map' + catalogue.IN_LUNGS
    scores = make_scores(**{name: 0.2})
    scores['no preference, inside the lungs'] += 0.3  # lungs alone are worth more than the map
    assert leading.measure_lead(scores, name, 'lesions', PATIENTS)['name'] is None
    assert leading.name_references('map', 'erasure')['chance'] == 'random map'


def test_patients_are_not_divided():
    first, second = leading.split_patients(['a', 'b', 'a', 'c', 'b'])
    assert (first, second) == ([0, 2, 3], [1, 4])
