import itertools
from collections import Counter

import numpy as np
import pytest

from covidjax.data.balance import divide_strata
from covidjax.data.loader import load_train_batches
from tests.data.test_folds import make_rows

# 2 normals of A and 10 of B, 3 pneumonias of B, 5 COVID-19 of C
ROWS = [
    row._replace(source=('A' if number < 2 else 'B', 'B', 'C')[row.label])
    for number, row in enumerate(make_rows((12, 3, 5), slices=1))
]
SOURCE = [{'image': np.zeros((4, 4, 1), np.uint8), 'label': row.label} for row in ROWS]


def draw(balance, count, first_step=0, shard=(0, 1), batch_size=6):
    strata = divide_strata(ROWS, balance)
    batches = load_train_batches(
        SOURCE, batch_size=batch_size, seed=5, first_step=first_step, shard=shard, strata=strata
    )
    return [batch['index'].tolist() for batch in itertools.islice(batches, count)]


def test_strata():
    assert divide_strata(ROWS, 'none') == []
    assert [(s.share, len(s.records)) for s in divide_strata(ROWS, 'class')] == [(1 / 3, 12), (1 / 3, 3), (1 / 3, 5)]
    strata = divide_strata(ROWS, 'class_and_source')
    assert [(s.share, s.records[0], len(s.records)) for s in strata] == [
        (1 / 6, 0, 2),
        (1 / 6, 2, 10),
        (1 / 3, 12, 3),
        (1 / 3, 15, 5),
    ]
    assert sorted(itertools.chain(*(s.records for s in strata))) == list(range(20))
    assert [s.share for s in divide_strata(ROWS[:15], 'class')] == [0.5, 0.5]  # an absent class has no share
    with pytest.raises(ValueError, match="balance='patient' must be one of none, class, class_and_source"):
        divide_strata(ROWS, 'patient')


@pytest.mark.parametrize('balance', ['class', 'class_and_source'])
def test_classes_come_equally_often(balance):
    drawn = list(itertools.chain(*draw(balance, 5)))
    assert np.bincount([ROWS[i].label for i in drawn]).tolist() == [10, 10, 10]


def test_sources_of_a_class_come_equally_often_and_records_of_a_stratum_in_passes():
    drawn = list(itertools.chain(*draw('class_and_source', 20)))  # 120
    counts = Counter((ROWS[i].label, ROWS[i].source) for i in drawn)
    assert counts == {(0, 'A'): 20, (0, 'B'): 20, (1, 'B'): 40, (2, 'C'): 40}
    each = Counter(drawn)
    assert [each[i] for i in range(12)] == [10, 10] + [2] * 10  # whole passes, reshuffled
    assert {each[i] for i in range(12, 15)} == {13, 14}
    passes = np.reshape([i for i in drawn if i >= 15], (8, 5))
    assert all(sorted(one) == list(range(15, 20)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


@pytest.mark.parametrize('balance', ['class', 'class_and_source'])
def test_the_stream_goes_on_where_it_stopped_and_is_shared_by_processes(balance):
    whole = draw(balance, 9)
    assert draw(balance, 5, first_step=4) == whole[4:]
    parts = [draw(balance, 9, shard=(p, 2)) for p in (0, 1)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
