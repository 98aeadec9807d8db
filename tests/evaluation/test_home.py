import numpy as np
import pytest

from covidjax.errors import UserError
from covidjax.evaluation.home import (
    choose_slices,
    compute_distances,
    describe_home,
    fit_home,
    load_home,
    save_home,
)


def draw(count, centre, seed, scale=1.0):
    """Slices of 40 statistics, of which the first ten differ by source."""
    x = np.random.default_rng(seed).normal(0, scale, (count, 40))
    x[:, :10] += centre
    return x.astype(np.float32)


@pytest.fixture(scope='module')
def home():
    statistics = np.concatenate([draw(80, 0, 1), draw(60, 3, 2), draw(5, -3, 3)])
    return fit_home(statistics, ['A'] * 80 + ['B'] * 60 + ['C'] * 5)


def test_new_slices_are_nearest_to_their_own_source(home):
    for name, centre in (('A', 0), ('B', 3), ('C', -3)):
        found = compute_distances(home, draw(30, centre, 9))
        assert min(found, key=found.get) == name
        assert found[name] == pytest.approx(1, abs=0.5)  # C has five slices: its centre is not well known
        assert all(found[other] > 1.5 * found[name] for other in 'ABC' if other != name)
    assert home.centres[1, :10].mean() == pytest.approx(3, abs=0.1)


def test_differences_inside_a_source_count_less(home):
    # Where slices of a source differ much, a distance means little: scale one statistic up for all.
    statistics = np.concatenate([draw(80, 0, 1), draw(60, 3, 2)])
    statistics[:, 39] *= 50
    moved = draw(30, 0, 9)
    moved[:, 39] = 60
    wide = compute_distances(fit_home(statistics, ['A'] * 80 + ['B'] * 60), moved)
    assert wide['A'] < 2
    assert compute_distances(home, moved)['A'] > 5


def test_words():
    two = [{'A': 1.0, 'B': 3.0}, {'A': 5.0, 'C': 2.5}]  # members that each left out a source
    found = describe_home(two, is_far=False)
    assert found == {'nearest': 'C', 'is_far': False, 'text': 'like C', 'distances': {'A': 3.0, 'B': 3.0, 'C': 2.5}}
    assert describe_home(two, is_far=True)['text'] == 'nearest to C, far from all'
    assert describe_home([{'A': 9.0}], is_far=True)['text'] == 'far from A'
    assert describe_home([], is_far=True) is None


def test_slices_that_are_used():
    sources = ['A'] * 900 + [''] * 50 + ['B'] * 5
    chosen = choose_slices(sources, 1000)
    assert [sources[i] for i in chosen] == ['A'] * 200 + ['B'] * 5
    assert chosen[0] == 0
    assert chosen[199] == 899  # evenly, both ends included
    assert len(choose_slices(sources, 100)) == 55
    assert choose_slices(['', ''], 100) == []


def test_too_few_or_flat_slices():
    assert fit_home(draw(15, 0, 1), ['A'] * 15) is None
    assert fit_home(np.ones((20, 40), np.float32), ['A'] * 20) is None


def test_files(home, tmp_path):
    save_home(tmp_path / 'sources.npz', home)
    again, slices = load_home(tmp_path / 'sources.npz'), draw(9, 3, 4)
    assert compute_distances(again, slices) == compute_distances(home, slices)
    assert load_home(tmp_path / 'none') is None
    (tmp_path / 'sources.npz').write_bytes(b'PK\3\4')
    with pytest.raises(UserError, match='is damaged: run --mode=evaluate'):
        load_home(tmp_path / 'sources.npz')
