import re

import numpy as np
import pytest

from covidjax.data.lists import CLASSES
from covidjax.data.published import SLICE_SCORES
from covidjax.evaluation.curves import compute_curves
from covidjax.evaluation.metrics import compute_metrics
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.screening import evaluate_rules, fit_rules
from covidjax.report import sections

HISTORY = [{'epoch': e, 'train_loss': 1.0, 'val_loss': 1.1, 'train_accuracy': 0.5, 'val_accuracy': 0.4} for e in (1, 2)]


def make_results(labels, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(labels), 3)) + 2 * np.eye(3)[labels]
    patients = [f'p{i // 4}' for i in range(len(labels))]
    metrics = compute_metrics(labels, logits.argmax(1), patients, CLASSES)
    rules = fit_rules(logits, labels, patients, CLASSES)
    return rules, {
        'data': 'phantoms',
        'notice': 'generated <phantoms>',
        'model': 'a model',
        'dataset': {
            'raw_dir': '/data/<b>x</b>',
            'fingerprint': 'abc',
            'image_size': 64,
            'slices': {'test': {'normal': 1}},
            'num_dropped': 0,
        },
        **metrics,
        'baselines': {'majority class': metrics},
        'curves': compute_curves(labels, softmax(logits), patients, CLASSES),
        'screening': evaluate_rules(rules, logits, labels, patients, CLASSES, train_shares_K=[0.2, 0.3, 0.5]),
        'training': {'best_epoch': 1, 'num_epochs': 2, 'num_steps': 8, 'seconds': 9.0},
        'environment': {'covidjax': '0', 'devices': ['cpu']},
    }


def write(path, labels, published):
    rules, results = make_results(labels)
    parts = [
        *sections.build_scores(results, published, table='Table III', unit='slices', others={}),
        *sections.build_statistics(results, rules, unit='slices'),
        sections.build_training(results, {'train.x': 1}, HISTORY),
        sections.build_limits(results),
    ]
    sections.write_report(path, results, parts, unit='slices')
    return path.read_text()


def test_page_stands_alone_and_escapes(tmp_path):
    page = write(tmp_path / 'report.html', np.arange(120) % 3, None)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(('data:', '#')) for source in sources)
    assert {s[1:] for s in sources if s.startswith('#')} == set(re.findall(r'<section id="([^"]*)"', page))
    assert 'generated &lt;phantoms&gt;' in page
    assert '<b>x</b>' not in page
    assert all('alt="' in image for image in re.findall(r'<img [^>]*>', page))
    assert 'not a medical device' in page
    assert 'paper' not in re.sub(r'Table III of the paper', '', page)
    assert 'nan' not in re.sub(r'data:[^"]*', '', page).lower()


def test_the_papers_column_stands_beside_ours(tmp_path):
    page = write(tmp_path / 'report.html', np.arange(120) % 3, SLICE_SCORES)
    assert page.count('<th scope="col" class="number">paper') == 3
    row = re.search(r'<tr><td class="">pneumonia</td>.*?</tr>', page).group()
    cells = re.findall(r'<td[^>]*>([^<]*)</td>', row)
    assert [cells[i] for i in (3, 6, 9)] == ['0.967', '0.963', '0.965']


@pytest.mark.parametrize('labels', [np.zeros(20, int), np.arange(20) % 2])
def test_missing_classes_are_stated(tmp_path, labels):
    page = write(tmp_path / 'report.html', labels, None)
    assert 'No validation example is positive' in page
    assert 'nan' not in re.sub(r'data:[^"]*', '', page).lower()


def test_a_single_patient_has_no_interval(tmp_path):
    page = write(tmp_path / 'report.html', np.array([0, 1, 2, 0]), None)
    assert '75.0% of 4 test slices' in page
    assert 'one patient, so no interval' in page


def test_verdicts_are_compared_only_with_lesions(tmp_path):
    assert sections.build_verdicts(None, unit='scans') == []
    found = {'sick_auc': 0.625, 'interval': [0.5, 0.75]}
    counted = {**found, 'accuracy': 0.375, 'accuracy_interval': [0.25, 0.5]}
    of_split = {'classifier': counted, 'lesions': found, 'both': counted}
    [section] = sections.build_verdicts({'val': of_split, 'test': of_split}, unit='scans')
    _, results = make_results(np.arange(120) % 3)
    sections.write_report(tmp_path / 'report.html', results, [section], unit='scans')
    page = (tmp_path / 'report.html').read_text()
    for title in ('Validation scans', 'Test scans'):
        assert title in page
    assert page.count('0.625') == 6
    assert page.count('0.375') == 4
