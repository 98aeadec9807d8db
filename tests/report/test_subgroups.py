from covidjax.data.lists import CLASSES
from covidjax.evaluation.subgroups import compute_subgroups
from covidjax.report.page import Table
from covidjax.report.subgroups import build_subgroups
from tests.evaluation.test_external import make_side


def test_small_groups_are_named_and_a_report_without_columns_has_no_section():
    side = make_side(120, 3, 0)
    patients = [str(i) for i in range(120)]
    groups = ['a'] * 60 + ['b'] * 50 + ['few'] * 10
    probabilities = abs(side.logits) / abs(side.logits).sum(1, keepdims=True)
    thresholds = {'covid19': 0.3, 'disease': 0.5}
    found = compute_subgroups({'source': groups}, side.labels, probabilities, patients, CLASSES, thresholds)
    [section] = build_subgroups(found, unit='slices')
    tables = [part for part in section.parts if isinstance(part, Table)]
    assert [row[:3] for row in tables[0].rows] == [('a', 60, 60), ('b', 50, 50)]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert 'By source, not scored, with their patients: few (10).' in section.parts
    assert len(tables[1].rows) == 5
    empty = compute_subgroups(
        {'source': ['not given'] * 120}, side.labels, probabilities, patients, CLASSES, thresholds
    )
    assert build_subgroups(empty, unit='slices') == []
