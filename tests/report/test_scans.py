import numpy as np
import pytest

from covidjax.data.sequences import Scan
from covidjax.models.att2 import Att2
from covidjax.report.scans import create_examples
from tests.variables import draw_variables


def test_the_slice_of_highest_attention_keeps_its_map():
    model = Att2((1, 1), width=4, block='basic', stem='small', tail_blocks=1)
    variables = draw_variables(model, np.zeros((1, 32, 32, 1), np.float32), train=False, full=True)
    rng = np.random.default_rng(0)
    source = [{'image': rng.integers(0, 256, (32, 32, 1), np.uint8)} for _ in range(40)]
    scan = Scan('s', 'p', 1, tuple(range(100, 120)), tuple(range(5, 25)))
    attention = np.full(20, 0.01)
    attention[19] = 0.81

    plain, weighted = create_examples(model, variables, source, scan, attention)
    assert len(plain) == len(weighted) == 16
    assert (plain[0].title, weighted[0].title, weighted[-1].title) == ('100', '100: 0.010', '119: 0.810')
    np.testing.assert_array_equal(plain[-1].image, source[24]['image'][..., 0])
    assert weighted[-1].overlay.max() == pytest.approx(1)
    assert weighted[0].overlay.max() == pytest.approx(0.01 / 0.81)
