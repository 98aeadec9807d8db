from covidjax.report.page import format_cell


def test_cells():
    cells = [format_cell(value) for value in (None, 12345, 0.5, 12345.6, [0.25, 0.75], 'a')]
    assert cells == ['\N{EN DASH}', '12,345', '0.500', '12,346', '0.250 to 0.750', 'a']
