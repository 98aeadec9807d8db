import os
import pickle
import signal
import subprocess
import sys
import time

import filelock
import joblib
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from covidjax.data import covidx_ct, lists, preprocess, records
from covidjax.data.loader import load_train_batches
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.errors import UserError

SIZE = 16


def make_raw(directory, slices_per_scan=3, version='2A'):
    """Writes a raw directory of random pixels: two scans per class in train, one each in val and test."""
    rng = np.random.default_rng(0)
    images = directory / f'{version}_images'
    images.mkdir(parents=True)
    number = 0
    for split, scans_per_class in (('train', 2), ('val', 1), ('test', 1)):
        lines = []
        for label, prefix in enumerate(('Normal', 'CP', 'NCP')):
            for _ in range(scans_per_class):
                number += 1
                for i in range(slices_per_scan):
                    # Descending numbers, so that neither names nor labels are sorted.
                    file = f'{prefix}_{100 - number}_1_{i:04d}.png'
                    Image.fromarray(rng.integers(0, 256, (24, 20 + i), dtype=np.uint8)).save(images / file)
                    lines.append(f'{file} {label} 1 2 18 99\n')
        (directory / f'{split}_COVIDx_CT-{version}.txt').write_text(''.join(lines))
    return str(directory)


@pytest.fixture
def raw(tmp_path):
    return make_raw(tmp_path / 'raw')


@pytest.fixture
def run(raw, tmp_path):
    def prepare(**changes):
        return covidx_ct.prepare(
            **{'raw_dir': raw, 'image_size': SIZE, 'prepared_dir': str(tmp_path / 'out'), **changes}
        )

    return prepare


def get_error(function, **changes):
    with pytest.raises(UserError) as caught:
        function(**changes)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def list_datasets(tmp_path):
    """Returns the datasets that look complete."""
    return sorted(path.parent.name for path in (tmp_path / 'out').glob('covidx_ct/*/[0-9]*'))


def list_leftovers(tmp_path):
    # Ignores .config: a kill may leave a folder there too, but it only holds TFDS config notes, which are never read.
    return list((tmp_path / 'out').glob('covidx_ct/[!.]*/incomplete*'))


def test_records_are_the_listed_slices_in_list_order(run, raw):
    prepared = run()
    assert prepared.version == '2A'
    assert prepared.dropped == []
    assert prepared.rows == lists.read_lists(raw)
    for split in lists.SPLITS:
        source, rows = prepared.sources[split], prepared.rows[split]
        assert len(source) == len(rows) == {'train': 18, 'val': 9, 'test': 9}[split]
        for i in range(len(rows)):
            record = source[i]
            assert set(record) == {'image', 'label'}
            assert record['label'] == rows[i].label
            assert record['image'].dtype == np.uint8
            expected = preprocess.load_slice(os.path.join(raw, '2A_images', rows[i].file), rows[i].box, SIZE)
            np.testing.assert_array_equal(record['image'], expected[..., np.newaxis])


def test_source_by_several_indices_and_after_pickling(run):
    source = pickle.loads(pickle.dumps(run().sources['train']))
    records = source.__getitems__([5, 0])
    np.testing.assert_array_equal(records[0]['image'], source[5]['image'])
    np.testing.assert_array_equal(records[1]['image'], source[0]['image'])
    assert source.__getitems__([]) == []
    with pytest.raises(IndexError):
        source[18]


def test_every_column_is_in_the_records(run):
    prepared = run()
    builder = tfds.builder_from_directory(prepared.path)
    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    record = builder.as_data_source('val', deserialize_method=raw_bytes)[4]
    columns = tf_example_pb2.Example.FromString(record).features.feature
    row = prepared.rows['val'][4]
    assert columns['scan'].bytes_list.value[0].decode() == row.scan
    assert columns['patient'].bytes_list.value[0].decode() == row.patient
    assert columns['file'].bytes_list.value[0].decode() == row.file
    assert columns['slice_index'].int64_list.value[0] == row.slice_index == 1
    assert builder.info.features['label'].names == list(lists.CLASSES)


@pytest.mark.parametrize('version', ['1', '3A'])
def test_other_versions(run, tmp_path, version):
    prepared = run(raw_dir=make_raw(tmp_path / 'other', version=version))
    assert prepared.version == version
    assert f'{os.sep}{version.lower()}_16px_' in prepared.path


def test_shards_keep_the_order(run, monkeypatch):
    monkeypatch.setattr(records, 'SHARD_SIZE', 4)
    prepared = run()
    assert len([f for f in os.listdir(prepared.path) if 'train.array_record' in f]) == 5
    assert [r['label'] for r in prepared.sources['train']] == [row.label for row in prepared.rows['train']]


def test_worker_processes_keep_the_order(run, monkeypatch):
    monkeypatch.setattr(records, 'BATCH_SIZE', 2)
    prepared = run()
    alone = run(prepared_dir=prepared.path + '-alone')
    for several, one in zip(prepared.sources['train'], alone.sources['train'], strict=True):
        np.testing.assert_array_equal(several['image'], one['image'])


def test_prepared_data_is_reused_without_the_images(run, raw, tmp_path):
    first = run()
    os.rename(os.path.join(raw, '2A_images'), os.path.join(raw, 'moved'))
    again = run()
    assert (again.path, again.fingerprint) == (first.path, first.fingerprint)
    np.testing.assert_array_equal(again.sources['test'][0]['image'], first.sources['test'][0]['image'])


def test_a_changed_list_or_size_is_another_dataset(run, raw):
    first = run()
    assert run(image_size=12).sources['val'][0]['image'].shape == (12, 12, 1)
    path = os.path.join(raw, 'val_COVIDx_CT-2A.txt')
    with open(path) as file:
        lines = file.readlines()
    with open(path, 'w') as file:
        file.writelines(lines[1:])
    changed = run()
    assert changed.fingerprint != first.fingerprint
    assert changed.path != first.path
    assert len(changed.sources['val']) == len(first.sources['val']) - 1


def test_missing_images_are_found_before_decoding(run, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess, 'encode_slices', None)
    for name in os.listdir(os.path.join(raw, '2A_images')):
        os.remove(os.path.join(raw, '2A_images', name))
    message = get_error(run)
    assert message.count('(missing)') == 20
    assert '(36 in all, the first 20 shown)' in message
    assert 'Normal_99_1_0000.png (missing); Normal_99_1_0001.png' in message
    assert 'skip_bad=True' in message
    assert list_datasets(tmp_path) == list_leftovers(tmp_path) == []


def spoil(raw, *, split, position, data):
    row = lists.read_lists(raw)[split][position]
    with open(os.path.join(raw, '2A_images', row.file), 'wb') as file:
        file.write(data)
    return row.file


def test_unreadable_images_of_all_splits_are_named_and_nothing_is_left(run, raw, tmp_path):
    with open(os.path.join(raw, '2A_images', 'Normal_99_1_0000.png'), 'rb') as file:
        whole = file.read()
    truncated = spoil(raw, split='test', position=1, data=whole[: len(whole) // 2])
    text = spoil(raw, split='train', position=3, data=b'text')
    message = get_error(run)
    assert f'{text} (not an image); {truncated} (' in message
    assert 'truncated' in message
    assert '(2 in all)' in message
    assert list_datasets(tmp_path) == list_leftovers(tmp_path) == []


def test_skip_bad_drops_and_records(run, raw):
    text = spoil(raw, split='train', position=3, data=b'text')
    absent = lists.read_lists(raw)['val'][0].file
    os.remove(os.path.join(raw, '2A_images', absent))
    for _ in range(2):  # first prepared, then reused
        prepared = run(skip_bad=True)
        assert prepared.dropped == [(absent, 'missing'), (text, 'not an image')]
        assert [len(prepared.sources[s]) for s in lists.SPLITS] == [17, 8, 9]
        assert [row.file for row in prepared.rows['val']] == [r.file for r in lists.read_lists(raw)['val'][1:]]
        assert [r['label'] for r in prepared.sources['train']] == [row.label for row in prepared.rows['train']]
    get_error(run)  # without skip_bad, the dataset is not reused


def test_a_shard_without_a_good_image(run, raw, monkeypatch):
    monkeypatch.setattr(records, 'SHARD_SIZE', 3)
    for i in range(3):
        spoil(raw, split='val', position=i, data=b'')
    prepared = run(skip_bad=True)
    assert [r['label'] for r in prepared.sources['val']] == [1, 1, 1, 2, 2, 2]


def test_skip_bad_reuses_a_complete_dataset(run):
    assert run().path == run(skip_bad=True).path


def test_skip_bad_does_not_lose_a_class_or_a_split(run, raw, tmp_path):
    rows = lists.read_lists(raw)
    spoiled = [i for i, row in enumerate(rows['train']) if row.label == 1]
    for i in spoiled:
        spoil(raw, split='train', position=i, data=b'')
    assert 'train has no pneumonia' in get_error(run, skip_bad=True)
    for row in rows['test']:
        os.remove(os.path.join(raw, '2A_images', row.file))
    assert 'test is empty' in get_error(run, skip_bad=True)
    assert list_datasets(tmp_path) == list_leftovers(tmp_path) == []


def test_decompression_bomb_is_named(run, raw, monkeypatch):
    monkeypatch.setattr(preprocess, 'MAX_PIXELS', 24 * 20)
    message = get_error(run)
    assert 'more than 480 pixels, taken for a decompression bomb' in message


def test_no_image_folder(run, raw):
    os.rename(os.path.join(raw, '2A_images'), os.path.join(raw, 'elsewhere'))
    assert 'holds no image folder: expected 2A_images or images' in get_error(run)


def test_unwritable_place(run, tmp_path):
    (tmp_path / 'file').touch()
    message = get_error(run, prepared_dir=str(tmp_path / 'file' / 'deeper'))
    assert f'{tmp_path}/file/deeper' in message
    assert 'prepared_dir' in message


def test_full_disk(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('write() failed: No space left on device;\n writing x')

    monkeypatch.setattr(tfds.core.ShardBasedBuilder, '_download_and_prepare', fail)
    assert '(write() failed: No space left on device; writing x): make room' in get_error(run)
    assert list_datasets(tmp_path) == list_leftovers(tmp_path) == []


def test_default_place_is_that_of_tfds(run, tmp_path, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'elsewhere'))
    assert run(prepared_dir='').path.startswith(str(tmp_path / 'elsewhere'))


def test_damaged_dataset(run):
    prepared = run()
    shard = next(f for f in os.listdir(prepared.path) if 'val.array_record' in f)
    os.truncate(os.path.join(prepared.path, shard), 100)
    assert 'is damaged' in get_error(run)
    os.remove(os.path.join(prepared.path, shard))
    assert 'is damaged' in get_error(run)


def test_leftovers_of_this_dataset_only_are_removed(run, tmp_path):
    config = os.path.basename(os.path.dirname(run(image_size=12).path))
    other = tmp_path / 'out' / 'covidx_ct' / config / 'incomplete.AAAAAA_1.0.0'
    other.mkdir()
    path = run().path
    own = os.path.join(os.path.dirname(path), 'incomplete.BBBBBB_1.0.0')
    os.rename(path, own)  # as a killed run leaves it
    assert len(run().sources['train']) == 18
    assert not os.path.exists(own)
    assert other.is_dir()


def test_one_log_line_and_nothing_on_stdout(run, caplog, capsys):
    with caplog.at_level('INFO', logger='covidjax'):
        path = run().path
    messages = {record.getMessage() for record in caplog.records}
    assert len(messages) == 1
    assert path in messages.pop()
    output = capsys.readouterr()
    assert output.out == output.err == ''  # a bar is for terminals


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have set it to ignored
from covidjax.data import covidx_ct, preprocess
load = preprocess.load_slice
def load_slowly(*args):
    time.sleep(float(sys.argv[3]))
    return load(*args)
preprocess.load_slice = load_slowly
prepared = covidx_ct.prepare(sys.argv[1], image_size=16, prepared_dir=sys.argv[2])
print(len(prepared.sources['train']))
"""


def start_child(raw, tmp_path, seconds_per_slice):
    arguments = [sys.executable, '-c', CHILD, raw, str(tmp_path / 'out'), str(seconds_per_slice)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_nothing_that_passes_for_whole(run, raw, tmp_path, how):
    child = start_child(raw, tmp_path, 60)
    wait_until(lambda: list_leftovers(tmp_path))
    child.send_signal(how)
    child.communicate(timeout=30)
    assert child.returncode != 0
    assert list_datasets(tmp_path) == []
    assert len(run().sources['train']) == 18
    assert list_leftovers(tmp_path) == []


def test_a_killed_worker_is_told_from_a_full_disk(run, tmp_path, monkeypatch):
    main_pid = os.getpid()

    def die(*_):
        assert os.getpid() != main_pid
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(joblib, 'cpu_count', lambda: 2)
    monkeypatch.setattr(records, 'BATCH_SIZE', 1)  # with one batch, this process would do the work
    monkeypatch.setattr(preprocess, 'encode_slices', die)
    assert 'a worker process was killed, most likely for want of memory' in get_error(run)
    assert list_datasets(tmp_path) == list_leftovers(tmp_path) == []
    monkeypatch.undo()
    assert len(run().sources['train']) == 18


def test_a_second_process_waits_and_reuses(run, raw, tmp_path):
    child = start_child(raw, tmp_path, 0.02)
    wait_until(lambda: list_leftovers(tmp_path))
    lock = next((tmp_path / 'out' / 'covidx_ct').glob('*/prepare.lock'))
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(lock).acquire(timeout=0)
    prepared = run()
    assert child.communicate(timeout=30)[0] == '18\n'
    assert len(prepared.sources['train']) == 18
    assert len(list_datasets(tmp_path)) == 1


def test_a_worker_ends_after_its_main_process(tmp_path):
    code = (
        'import os, sys, time\n'
        'from covidjax.data import preprocess\n'
        'if os.fork() == 0:\n'
        '    preprocess.encode_slices([], 8, os.getppid())\n'
        '    print(os.getpid(), flush=True)\n'
        '    time.sleep(60)\n'
        'time.sleep(0.5)\n'
        'os._exit(0)\n'
    )
    start = time.monotonic()
    # The worker inherits stdout, so `run` returns only after the worker has ended.
    subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, timeout=30, check=True)
    assert time.monotonic() - start < 20


def test_unreadable_record_is_named_and_ends_the_stream():
    source = covidx_ct.SliceSource([b'\xff\xff'] * 4, '/prepared', ['a.png', 'b.png', 'c.png', 'd.png'])
    with pytest.raises(UserError, match=r'record 2 \(c.png\) of the prepared dataset in /prepared is unreadable'):
        source[2]
    with pytest.raises(UserError, match='is unreadable'):
        next(load_train_batches(source, batch_size=2, seed=0, first_step=0))


def test_regions_are_datasets_of_their_own(tmp_path):
    raw = tmp_path / 'raw'
    write_phantoms(raw, PhantomOptions(num_train=3, num_val=3, num_test=3, image_size=96, max_slices=12))
    options = {'raw_dir': str(raw), 'image_size': 32, 'prepared_dir': str(tmp_path / 'out')}
    body, lungs = (covidx_ct.prepare(**options, region=region) for region in ('body', 'lungs'))
    assert body.fingerprint == covidx_ct.prepare(**options).fingerprint != lungs.fingerprint
    row, image = lungs.rows['test'][5], lungs.sources['test'][5]['image'][..., 0]
    expected = preprocess.load_slice(str(raw / '2A_images' / row.file), row.box, 32, 'lungs')
    np.testing.assert_array_equal(image, expected)
    assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 10
    assert body.sources['test'][5]['image'].mean() > image.mean() + 20  # the body is brighter


def test_a_slice_without_lungs_is_named_and_can_be_skipped(run, raw):
    row = lists.read_lists(raw)['val'][0]
    Image.new('L', (20, 24), 128).save(os.path.join(raw, '2A_images', row.file))
    message = get_error(run, region='lungs')
    assert row.file in message
    assert 'no lungs found in it' in message
    assert 'skip_bad' in message
