import re

import pytest

from covidjax.data.lists import CLASSES
from covidjax.evaluation.external import compare_sides
from covidjax.evaluation.screening import fit_rules
from covidjax.report.external import SCORES, format_comparison, judge, list_scores
from tests.evaluation.test_external import make_side


def compare(outside, inside=None):
    side = make_side(400, 3, 0)
    rules = fit_rules(side.logits, side.labels, side.patients, CLASSES)
    return compare_sides(make_side(400, 3, 1) if inside is None else inside, outside, rules, CLASSES)


def test_every_score_has_a_title():
    assert list(compare(make_side(60, 3, 2))['scores']) == list(SCORES)


def test_verdicts():
    worse = compare(make_side(400, 0.5, 2))
    assert judge('accuracy', worse) == judge('brier', worse) == 'worse'
    better = compare(make_side(400, 3, 2), inside=make_side(400, 0.5, 1))
    assert judge('accuracy', better) == judge('nll', better) == 'better'
    same = compare(make_side(400, 3, 2))
    assert judge('accuracy', same) == 'no clear difference'
    assert judge('unusual', same) == ''
    assert judge('accuracy', compare(make_side(8, 0.5, 2))) == 'too few patients'


@pytest.mark.parametrize('labels', [(0, 1, 2), (0, 2), (0,)])
def test_summary_has_a_line_per_score(tmp_path, labels):
    comparison = compare(make_side(60, 3, 2, labels=labels))
    results = {
        'name': 'hospital',
        'unit': 'slices',
        'num_examples': 60,
        'num_patients': 30,
        'comparison': comparison,
        'baselines': {},
        'warnings': ['no pneumonia in these data'] if 1 not in labels else [],
    }
    text = format_comparison(results, tmp_path)
    for key, title, score in list_scores(comparison):
        [line] = [line for line in text.splitlines() if line.startswith(f'{title}  ')]
        if score['note']:
            assert line.endswith(score['note'])
        else:
            shown = float(re.search(r'([+-]\d\.\d{3})', line)[1])
            assert shown == pytest.approx(score['difference'], abs=6e-4), key
    assert 'nan' not in text
    assert ('no pneumonia in these data' in text) == (1 not in labels)
