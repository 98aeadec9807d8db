import pytest

from covidjax.data.sources import (
    LoneClass,
    Subset,
    count_sources,
    describe_lone_classes,
    find_lone_classes,
    parse_sources,
    select_sources,
)
from covidjax.errors import UserError
from tests.data.test_folds import make_data, make_rows


def make_joined():
    """Normals of sources A and B, pneumonia of B, COVID-19 of C, in every list."""
    data = make_data()
    rows = {
        split: [row._replace(source=('AB'[int(row.patient[-1]) % 2], 'B', 'C')[row.label]) for row in of_split]
        for split, of_split in data.rows.items()
    }
    return data._replace(rows=rows)


def test_the_slices_of_chosen_sources():
    data = make_joined()
    found = select_sources(data, parse_sources(' A ,C,'))
    for split, rows in found.rows.items():
        assert {row.source for row in rows} == {'A', 'C'}
        assert rows == [row for row in data.rows[split] if row.source != 'B']
        assert [record['image'] for record in found.sources[split]] == [row.file for row in rows]
    assert select_sources(data, []) is data
    assert len({data.fingerprint, found.fingerprint, select_sources(data, ['B', 'C']).fingerprint}) == 3
    assert found.fingerprint == select_sources(data, ['C', 'A']).fingerprint
    with pytest.raises(IndexError):
        Subset([])[0]


def test_sources_that_cannot_be_chosen():
    data = make_joined()
    with pytest.raises(UserError, match=r'^no source D, E: the lists have A, B, C$'):
        select_sources(data, ['A', 'D', 'E'])
    with pytest.raises(UserError, match=r'data.sources=C leaves one class to train on'):
        select_sources(data, ['C'])
    with pytest.raises(UserError, match='no source A: the lists have no sources'):
        select_sources(make_data(), ['A'])
    data.rows['val'][:] = [row for row in data.rows['val'] if row.source == 'B']
    with pytest.raises(UserError, match=r'data.sources=A,C leaves no slice for val'):
        select_sources(data, ['A', 'C'])


def test_counts():
    rows = make_joined().rows
    counts = count_sources(rows)
    assert list(counts) == ['A', 'B', 'C']
    assert counts['C']['train'] == {'normal': 0, 'pneumonia': 0, 'covid19': sum(r.label == 2 for r in rows['train'])}
    assert sum(n for by_split in counts.values() for n in by_split['train'].values()) == len(rows['train'])
    assert count_sources(make_data().rows) == {}
    rows['test'][0] = rows['test'][0]._replace(source='')
    assert sum(count_sources(rows)['not given']['test'].values()) == 1


def test_classes_of_one_source():
    rows = make_joined().rows['train']
    lone = find_lone_classes(rows)
    assert lone == [LoneClass('pneumonia', 'B'), LoneClass('covid19', 'C')]
    assert describe_lone_classes(lone) == (
        'pneumonia (B) and covid19 (C) come from one source each: what separates them may be the source'
    )
    assert describe_lone_classes(lone[:1]) == (
        'pneumonia comes from one source (B): what separates it may be the source'
    )
    assert describe_lone_classes([]) == ''
    # One source for everything, or none that is known: nothing to say.
    assert find_lone_classes([row._replace(source='A') for row in rows]) == []
    assert find_lone_classes(make_rows((1, 1, 1))) == []
    assert find_lone_classes([row._replace(source='A' if row.label else '') for row in rows]) == [
        LoneClass('pneumonia', 'A'),
        LoneClass('covid19', 'A'),
    ]
