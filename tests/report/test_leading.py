import pytest

from covidjax.report.leading import describe_lead, get_shown_map, list_margins


def make_lead(**changes):
    wins, ties = ({'mean': mean, 'interval': [mean - 0.1, mean + 0.1], 'number': 40} for mean in (0.2, 0.0))
    return {
        'name': 'attention 2, inside the lungs',
        'best': 'attention 2, inside the lungs',
        'by': 'lesions',
        'chosen_on': '20 validation slices with a lesion',
        'num_slices': 40,
        'num_patients': 30,
        'scores': {'pointing': wins, 'auc': wins},
        'margins': {
            'chance': {'pointing': wins, 'auc': wins},
            'centre': {'pointing': wins, 'auc': wins},
            'grey': {'pointing': ties, 'auc': wins},
            'lungs': {'pointing': wins, 'auc': wins},
        },
        **changes,
    }


def test_a_map_that_leads_is_named_with_what_it_does_not_beat():
    text = describe_lead(make_lead())
    assert "The leading map is 'attention 2, inside the lungs': it beats chance." in text
    assert 'does not clearly beat smoothed grey' in text
    assert 'the centre' not in text
    assert '40 other slices of 30 patients' in text


def test_a_run_without_a_leading_map_says_so():
    text = describe_lead(make_lead(name=None))
    assert text.startswith('No map of this run beats chance, so none is shown as an explanation.')
    assert 'lead' not in text


def test_margins_name_the_control():
    rows = list_margins(make_lead()).rows
    assert len(rows) == 10
    assert ('pointing game', 'less smoothed grey values inside the lungs', 0.0, [-0.1, 0.1]) in rows


@pytest.mark.parametrize(
    ('results', 'expected'),
    [
        ({'explanations': {'leading_map': make_lead()}}, 'attention 2, inside the lungs'),
        ({'explanations': {'leading_map': make_lead(name=None)}}, None),
        ({}, 'evidence, predicted class'),  # never scored
    ],
)
def test_the_map_that_is_shown(results, expected):
    assert get_shown_map(results) == expected
