import json
from pathlib import Path

import numpy as np
import pytest

from covidjax.data.covidx_ct import Prepared
from covidjax.data.folds import (
    Fold,
    divide_patients,
    divide_sources,
    get_sources,
    list_patients,
    parse_groups,
    read_fold,
    select_fold,
    write_fold,
)
from covidjax.data.lists import Row
from covidjax.errors import UserError


def make_rows(counts, prefix='', slices=3):
    """Returns rows of `counts[label]` patients of each class, `slices` of each."""
    return [
        Row(f'{prefix}{label}x{p}_{s:04}.png', label, (0, 0, 9, 9), f'{prefix}{label}x{p}', f'{prefix}{label}x{p}', s)
        for label, count in enumerate(counts)
        for p in range(count)
        for s in range(slices)
    ]


def make_data():
    rows = {'train': make_rows((6, 5, 7)), 'val': make_rows((2, 2, 2), 'v'), 'test': make_rows((1, 1, 1), 't')}
    sources = {split: [{'image': row.file, 'label': row.label} for row in of_split] for split, of_split in rows.items()}
    return Prepared(Path('raw'), '2A', 'abc', 'path', rows, sources, [])


@pytest.mark.parametrize('num_folds', [2, 3, 5])
def test_every_patient_is_held_out_once_and_classes_are_spread(num_folds):
    rows = make_rows((12, 10, 23))
    folds = divide_patients(rows, num_folds, seed=0)
    held_out = [patient for fold in folds for patient in fold.held_out]
    assert sorted(held_out) == sorted({row.patient for row in rows})
    for fold in folds:
        assert not set(fold.held_out) & set(fold.validation)
        for label, count in enumerate((12, 10, 23)):
            number = sum(patient.startswith(f'{label}x') for patient in fold.held_out)
            assert abs(number - count / num_folds) < 1.01
            assert any(patient.startswith(f'{label}x') for patient in fold.validation)
    if num_folds > 2:  # the next fold validates
        assert [fold.validation for fold in folds] == [fold.held_out for fold in (*folds[1:], folds[0])]
    else:  # half of the other fold
        assert set(folds[0].validation) < set(folds[1].held_out)
    assert divide_patients(rows, num_folds, seed=0) == folds
    assert divide_patients(rows, num_folds, seed=1) != folds
    assert divide_patients(rows[::-1], num_folds, seed=0) == folds  # the order of the lists does not matter


def test_too_few_patients():
    with pytest.raises(UserError, match=r'--folds=5: only 4 patients of train and val are pneumonia: pass --folds=4'):
        divide_patients(make_rows((9, 4, 9)), 5, 0)
    with pytest.raises(UserError, match='at least 3 patients of every class'):
        divide_patients(make_rows((9, 2, 9)), 3, 0)
    with pytest.raises(UserError, match='must be at least 2'):
        divide_patients(make_rows((9, 9, 9)), 1, 0)
    assert len(divide_patients(make_rows((9, 0, 9)), 3, 0)) == 3  # a class that is absent everywhere


def test_a_patient_counts_for_the_class_of_most_slices():
    rows = [row._replace(patient='p') for row in make_rows((1, 1), slices=2)] + make_rows((0, 1))[:1]
    rows[-1] = rows[-1]._replace(patient='p')
    patients, labels = list_patients(rows)
    assert (patients, labels.tolist()) == (['p'], [1])
    assert list_patients(rows[:-1])[1].tolist() == [0]  # a tie


def test_a_fold_takes_rows_and_records_from_both_lists_and_none_from_test():
    data = make_data()
    fold = Fold('fold 1 of 2', held_out=('0x1', 'v2x0'), validation=('1x0', 'v0x1'))
    found = select_fold(data, fold)
    assert {row.patient for row in found.rows['test']} == {'0x1', 'v2x0'}
    assert {row.patient for row in found.rows['val']} == {'1x0', 'v0x1'}
    assert len(found.rows['train']) == 3 * (18 + 6 - 4)
    for split, rows in found.rows.items():
        assert [record['image'] for record in found.sources[split]] == [row.file for row in rows]
        assert not any(row.patient.startswith('t') for row in rows)
    assert found.fold == 'fold 1 of 2'
    assert found.fingerprint != data.fingerprint
    assert found.fingerprint != select_fold(data, fold._replace(held_out=('0x1',))).fingerprint
    with pytest.raises(IndexError):
        found.sources['val'][6]


SOURCES = {f'{label}x{p}': 'AB'[p % 2] if label < 2 else 'C' for label in range(3) for p in range(12)}


def test_every_source_or_group_is_held_out_once():
    rows = make_rows((12, 4, 10))
    folds = divide_sources(rows, SOURCES, (), 0)
    assert [fold.name for fold in folds] == ['without A', 'without B', 'without C']
    for name, fold in zip('ABC', folds, strict=True):
        assert set(fold.held_out) == {p for p in {row.patient for row in rows} if SOURCES[p] == name}
        assert not set(fold.held_out) & set(fold.validation)
        assert not any(SOURCES[patient] == name for patient in fold.validation)
    # One in five of each stratum validates, and one of two.
    counts = [(p[0], SOURCES[p]) for p in folds[0].validation]
    assert {key: counts.count(key) for key in set(counts)} == {('0', 'B'): 1, ('1', 'B'): 1, ('2', 'C'): 2}
    groups = parse_groups('A, C ; B;')
    assert groups == [('A', 'C'), ('B',)]
    first, second = divide_sources(rows, SOURCES, groups[:1], 0)[0], folds[0]
    assert set(first.held_out) > set(second.held_out)
    assert divide_sources(rows, SOURCES, (), 0) == folds
    assert divide_sources(rows, SOURCES, (), 1) != folds


def test_groups_that_are_none():
    rows = make_rows((12, 4, 10))
    for text, words in (('A;D', "'D' is no source of train and val; sources are A, B, C"), ('A;A,B', 'in two groups')):
        with pytest.raises(UserError, match=words):
            divide_sources(rows, SOURCES, parse_groups(text), 0)
    with pytest.raises(UserError, match='without A, B fewer than two classes are left'):
        divide_sources(rows, SOURCES, [('A', 'B')], 0)


def test_every_patient_needs_a_source(tmp_path):
    rows = [row._replace(source=' AB'[row.label]) for row in make_rows((0, 1, 1))]
    data = make_data()._replace(raw_dir=tmp_path, rows={'train': rows, 'val': [], 'test': []})
    assert get_sources(data) == {'1x0': 'A', '2x0': 'B'}
    rows[0] = rows[0]._replace(source='', patient='new')
    with pytest.raises(UserError, match=r'metadata.csv gives no source for 1 patients of the lists, new first'):
        get_sources(data)


def test_lists_that_changed_and_empty_splits():
    data = make_data()
    with pytest.raises(UserError, match='1 of its patients, gone first, are not in the lists of raw'):
        select_fold(data, Fold('fold 1 of 2', ('gone',), ('0x1',)))
    with pytest.raises(UserError, match='leaves no patient for val'):
        select_fold(data, Fold('fold 1 of 2', ('0x1',), ()))


def test_there_and_back(tmp_path):
    fold = divide_patients(make_rows((4, 4, 4)), 3, 0)[1]
    assert read_fold(tmp_path) is None
    write_fold(tmp_path, fold)
    assert read_fold(tmp_path) == fold
    for text in ('{', '[]', json.dumps({'name': 'a'})):
        (tmp_path / 'fold.json').write_text(text)
        with pytest.raises(UserError, match=r'fold\.json is unreadable'):
            read_fold(tmp_path)
    assert np.all([isinstance(part, tuple) for part in fold[1:]])
