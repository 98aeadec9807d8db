import re

import numpy as np

from covidjax.report.checklist import AUTHORS, CLAIM, TRIPOD, Run, fill_items, write_checklist
from tests.report.test_sections import make_results

CONFIG = {
    'seed': 3,
    'data.image_size': 64,
    'data.region': 'body',
    'data.phantom_seed': 0,
    'model.width': 4,
    'train.batch_size': 16,
}


def make_run(external=()):
    _, results = make_results(np.arange(120) % 3)
    results['training']['pretrained'] = 'none (from scratch)'
    return Run(results, CONFIG, external)


def test_both_guidelines_are_whole():
    numbers = [number for number, _, _ in TRIPOD]
    assert len(numbers) == len(set(numbers)) == 52
    assert {int(re.match(r'\d+', number)[0]) for number in numbers} == set(range(1, 28))
    assert [int(number) for number, _, _ in CLAIM] == list(range(1, 45))


def test_answers_come_from_the_results_and_the_rest_is_for_the_authors():
    run = make_run()
    claim = {number: answer for number, _, answer in fill_items(CLAIM, run)}
    assert claim['34'] == claim['44'] == claim['33'] == AUTHORS
    assert f'{run.results["accuracy"]:.3f}' in claim['32']
    assert 'seed 3' in claim['24']
    assert 'Epoch 1 of 2' in claim['26']
    assert 'phantoms' in claim['7']
    tripod = {number: answer for number, _, answer in fill_items(TRIPOD, run)}
    assert tripod['17'] == tripod['23b'] == tripod['24'] == AUTHORS


def test_tests_on_other_data_fill_their_items():
    side = {'value': 0.25, 'interval': [0.1, 0.4]}
    test = {
        'name': 'hospital',
        'unit': 'slices',
        'num_examples': 10,
        'num_patients': 5,
        'accuracy': 0.5,
        'intervals': {'accuracy': [0.3, 0.7]},
        'comparison': {'scores': {'unusual': {'outside': side}}},
        'refit': {'temperature': 1.0, 'fitted_temperature': 2.0},
    }
    claim = {number: answer for number, _, answer in fill_items(CLAIM, make_run([test]))}
    assert claim['33'] == 'hospital: accuracy 0.500 (0.300 to 0.700) on 10 slices of 5 patients.'
    tripod = {number: answer for number, _, answer in fill_items(TRIPOD, make_run([test]))}
    assert '25.0% of the slices' in tripod['16']
    assert 'fitted to these data 2.000' in tripod['24']


def test_page_counts_what_is_open(tmp_path):
    run = make_run()
    write_checklist(tmp_path / 'checklist.html', *run)
    page = (tmp_path / 'checklist.html').read_text()
    open_ = sum(answer == AUTHORS for items in (TRIPOD, CLAIM) for _, _, answer in fill_items(items, run))
    assert f'{96 - open_} of 96 items' in page
    assert f'<td class="">{AUTHORS}</td>' in page
