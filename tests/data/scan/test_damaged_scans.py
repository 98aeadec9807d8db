import pytest

from tests.faults.damage_scans import KINDS, OUTCOMES, read_damaged


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_scans_are_read_or_refused(kind):
    outcomes = {read_damaged(kind, seed) for seed in range(8)}
    assert outcomes <= set(OUTCOMES)
    assert 'refused' in outcomes
