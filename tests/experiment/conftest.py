import pytest
from matplotlib.figure import Figure

from covidjax.report import slices as report_slices


@pytest.fixture(scope='module')
def without_pictures():
    """Leaves maps and figures out of the reports of slice runs: they take most of the time of tiny runs."""

    def save(figure, target, format=None, **_):
        target.write('<svg/>') if format == 'svg' else target.write_bytes(b'')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_slices, 'score_explanations', lambda *_, **__: {'leading_map': None})
        patch.setattr(report_slices, 'build_slice_sections', lambda *_: [])
        patch.setattr(Figure, 'savefig', save)
        yield
