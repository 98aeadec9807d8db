import itertools

import numpy as np
import pytest

from covidjax.data import sequences
from covidjax.data.lists import Row, read_list
from covidjax.data.sequences import Scan


def make_rows(counts, size=4):
    """Returns rows and records of scans with these slice counts. All pixels of a record equal its number."""
    rows = [
        Row(f's{s}_{i:04d}.png', s % 3, (0, 0, 9, 9), f's{s}', f'p{s}', i)
        for s, n in enumerate(counts)
        for i in range(n)
    ]
    source = [{'image': np.full((size, size, 1), r % 256, np.uint8), 'label': row.label} for r, row in enumerate(rows)]
    return rows, source


def test_scans_are_in_slice_order_whatever_the_order_of_rows():
    rows, _ = make_rows([3, 2])
    shuffled = [rows[i] for i in (2, 4, 0, 3, 1)]
    first, second = sequences.group_scans(shuffled)
    assert (first.scan, first.slices, first.records) == ('s0', (0, 1, 2), (2, 4, 0))
    assert (second.scan, second.slices, second.records) == ('s1', (0, 1), (3, 1))


@pytest.mark.parametrize(
    ('count', 'expected'),
    [
        (16, list(range(16))),
        # linspace(0, 30, 16) has step 2; linspace(0, 20, 16) has step 4/3, rounded.
        (31, list(range(0, 31, 2))),
        (21, [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 19, 20]),
    ],
)
def test_thinning_by_hand(count, expected):
    whole = Scan('s', 'p', 0, tuple(range(100, 100 + count)), tuple(range(count)))
    thin = sequences.thin_evenly(whole, 16)
    assert list(thin.records) == expected
    assert [s - 100 for s in thin.slices] == expected


@pytest.mark.parametrize('count', [17, 40, 418])
def test_thinning_keeps_both_ends_and_repeats_nothing(count):
    thin = sequences.thin_evenly(Scan('s', 'p', 0, tuple(range(count)), tuple(range(count))), 16)
    assert (thin.records[0], thin.records[-1], len(set(thin.records))) == (0, count - 1, 16)
    gaps = np.diff(thin.records)
    assert gaps.max() - gaps.min() <= 1


def test_public_validation_list_gives_431_scans(real_data):
    rows = read_list(real_data / 'covidx_lists' / 'val_COVIDx_CT-2A.txt')
    whole = sequences.group_scans(rows)
    assert len(whole) == 682
    kept = [scan for scan in whole if len(scan.records) >= 16]
    assert np.bincount([scan.label for scan in kept]).tolist() == [172, 112, 147]
    assert {len(scan.records) for scan in sequences.thin_scans(kept, 16)} == {16}
    # The published number, 430, comes from a loop that drops the last scan of the list.
    assert np.bincount([scan.label for scan in kept if scan.scan != whole[-1].scan]).tolist() == [172, 112, 146]


def test_lower_limit_keeps_scans_whole():
    whole = sequences.group_scans(make_rows([40, 3])[0])
    assert [len(scan.records) for scan in sequences.thin_scans(whole, 1)] == [40, 3]


@pytest.mark.parametrize(('count', 'padded'), [(1, 16), (16, 16), (17, 32), (64, 64), (418, 512)])
def test_padded_lengths(count, padded):
    assert sequences.pad_length(count) == padded


def test_passes_visit_each_scan_once_in_batches_of_one_length():
    whole = sequences.group_scans(make_rows([5, 20, 7, 16, 30, 2, 9])[0])  # five up to 16, two up to 32
    plan = sequences.plan_pass(whole, 2, np.random.default_rng(0))
    assert len(plan) == sequences.count_batches(whole, 2) == 3 + 1
    assert sorted(np.concatenate(plan)) == list(range(7))
    for members in plan:
        assert len({sequences.pad_length(len(whole[m].records)) for m in members}) == 1
    other = sequences.plan_pass(whole, 2, np.random.default_rng(1))
    assert [list(m) for m in other] != [list(m) for m in plan]


def test_batch_holds_slices_lengths_and_masks():
    rows, source = make_rows([3, 17, 2])
    whole = sequences.group_scans(rows)
    short, long = sequences.load_eval_scans(sequences.load_images(source, whole), whole, batch_size=3)
    assert short['image'].shape == (3, 4, 4, 16)
    assert long['image'].shape == (3, 4, 4, 32)
    assert short['index'][short['mask'] > 0].tolist() == [0, 2]
    assert short['length'].tolist() == [3, 2, 1]
    assert short['label'][:2].tolist() == [0, 2]
    assert short['image'][1, 0, 0].tolist() == [20, 21] + [0] * 14
    assert long['image'][0, 0, 0, :17].tolist() == list(range(3, 20))


def test_training_stream_goes_on_where_it_stopped():
    rows, source = make_rows([3, 17, 2, 5, 18])
    whole = sequences.group_scans(rows)
    load_images = sequences.load_images(source, whole)

    def take(first_step, count):
        stream = sequences.load_train_scans(load_images, whole, batch_size=2, seed=4, first_step=first_step)
        return [(b['index'].tolist(), b['mask'].tolist()) for b in itertools.islice(stream, count)]

    everything = take(0, 9)  # three batches per pass
    assert take(4, 5) == everything[4:]
    for number in range(3):
        one_pass = everything[3 * number : 3 * number + 3]
        visited = [i for indices, mask in one_pass for i, m in zip(indices, mask, strict=True) if m]
        assert sorted(visited) == [0, 1, 2, 3, 4]


def test_processes_share_the_batches_of_one():
    rows, source = make_rows([3, 17, 2, 5, 18])
    whole = sequences.group_scans(rows)
    load_images = sequences.load_images(source, whole)

    def load(shard):
        train = sequences.load_train_scans(load_images, whole, batch_size=4, seed=4, first_step=1, shard=shard)
        return [*itertools.islice(train, 3), *sequences.load_eval_scans(load_images, whole, batch_size=4, shard=shard)]

    parts = [load((process, 2)) for process in range(2)]
    for one, *halves in zip(load((0, 1)), *parts, strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array)


def test_embeddings_stand_where_the_images_of_their_scans_would():
    rows, source = make_rows([3, 17, 2])
    whole = sequences.group_scans(rows)
    assert sequences.locate_slices(whole) == [slice(0, 3), slice(3, 20), slice(20, 22)]
    embeddings = 100 * np.arange(1, 3)[:, None, None] + np.arange(22)[:, None] + np.array([0, 0.5])  # 2 draws, 22, 2

    short, long = sequences.load_eval_scans(sequences.load_embeddings(embeddings[:1], whole), whole, batch_size=3)
    assert short['embedding'].shape == (3, 16, 2)
    assert short['embedding'].dtype == np.float32
    assert short['embedding'][1, :, 0].tolist() == [120, 121] + [0] * 14
    assert long['embedding'][0, :17, 1].tolist() == [103.5 + i for i in range(17)]

    def take(load_slices, **options):
        stream = sequences.load_train_scans(load_slices, whole, batch_size=2, seed=4, first_step=1, **options)
        return list(itertools.islice(stream, 4))

    # Two batches per pass: the steps from 1 on belong to passes 0, 1, 1, 2, which use draws 0, 1, 1, 0.
    images = take(sequences.load_images(source, whole))
    batches = take(sequences.load_embeddings(embeddings, whole))
    for image, batch, draw in zip(images, batches, (0, 1, 1, 0), strict=True):
        for name in ('length', 'label', 'index', 'mask'):
            np.testing.assert_array_equal(batch[name], image[name])
        # The pixels of a record equal its number, which is also the number of its embedding.
        there = np.arange(batch['embedding'].shape[1]) < batch['length'][:, None]
        there &= batch['mask'][:, None] > 0
        expected = np.where(there, 100 * (draw + 1) + image['image'][:, 0, 0].astype(int), 0)
        np.testing.assert_array_equal(batch['embedding'][..., 0], expected)
    halves = [take(sequences.load_embeddings(embeddings, whole), shard=(process, 2)) for process in range(2)]
    for batch, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate([part['embedding'] for part in parts]), batch['embedding'])
