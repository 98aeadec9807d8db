import itertools

import numpy as np
import pytest

from covidjax.data.loader import load_eval_batches, load_train_batches


@pytest.fixture(scope='module')
def source():
    return [{'image': np.full((4, 4, 1), i, np.uint8), 'label': i % 3} for i in range(10)]


def take(iterator, count):
    return [batch['index'].tolist() for batch in itertools.islice(iterator, count)]


def test_each_pass_is_a_new_permutation(source):
    indices = np.concatenate(take(load_train_batches(source, batch_size=5, seed=0, first_step=0), 6)).reshape(3, 10)
    for one_pass in indices:
        assert sorted(one_pass) == list(range(10))
    assert len({tuple(one_pass) for one_pass in indices}) == 3


def test_batches_cross_the_end_of_a_pass(source):
    batches = take(load_train_batches(source, batch_size=4, seed=0, first_step=0), 5)
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(itertools.chain(*batches)) == sorted([*range(10), *range(10)])


def test_stream_goes_on_where_it_stopped(source):
    whole = take(load_train_batches(source, batch_size=4, seed=3, first_step=0), 9)
    assert take(load_train_batches(source, batch_size=4, seed=3, first_step=4), 5) == whole[4:]


def test_seed_sets_the_order(source):
    first, again, other = (take(load_train_batches(source, batch_size=4, seed=s, first_step=0), 5) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_evaluation_visits_each_record_once_in_order(source):
    batches = list(load_eval_batches(source, batch_size=4))
    assert all(batch['image'].shape == (4, 4, 4, 1) for batch in batches)
    kept = np.concatenate([batch['index'][batch['mask'] > 0] for batch in batches])
    assert kept.tolist() == list(range(10))
    assert batches[-1]['mask'].tolist() == [1, 1, 0, 0]


def test_batch_holds_the_record(source):
    batch = next(load_eval_batches(source, batch_size=4))
    assert batch['image'][3, 0, 0, 0] == 3
    assert batch['image'].dtype == np.uint8
    assert batch['label'].tolist() == [0, 1, 2, 0]
    assert batch['label'].dtype == np.int32


@pytest.mark.parametrize('num_processes', [2, 4])
def test_processes_share_the_batches_of_one(source, num_processes):
    shards = [(process, num_processes) for process in range(num_processes)]
    whole = take(load_train_batches(source, batch_size=8, seed=0, first_step=2), 5)
    parts = [take(load_train_batches(source, batch_size=8, seed=0, first_step=2, shard=s), 5) for s in shards]
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == whole

    whole = list(load_eval_batches(source, batch_size=8))
    parts = [list(load_eval_batches(source, batch_size=8, shard=shard)) for shard in shards]
    for name in ('image', 'index', 'mask'):
        joined = [np.concatenate([batch[name] for batch in rows]) for rows in zip(*parts, strict=True)]
        np.testing.assert_array_equal(joined, [batch[name] for batch in whole])
