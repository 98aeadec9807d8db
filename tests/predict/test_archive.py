import csv
import functools
import json
import os
import shutil
import time
import types

import jax
import joblib
import numpy as np
import pytest

from covidjax.data.preprocess import apply_window
from covidjax.errors import UserError
from covidjax.evaluation.outputs import ROUND_SIZE, OutputQueue, compute_outputs
from covidjax.experiment.runs import Member
from covidjax.predict import archive, scan, tables, tasks, units
from tests.predict import crashing
from tests.predict.test_scan import EXTRACTOR, RESULTS, RULES
from tests.scan_files import IDENTITY, create_nifti, encode_dicom, make_chest, make_dicom, write_images, write_series
from tests.variables import draw_variables

HU = make_chest()


@pytest.fixture(scope='module')
def run():
    from covidjax.configs import att2

    config = att2.get_config()
    config.data.image_size = 32
    variables = draw_variables(EXTRACTOR, np.zeros((1, 32, 32, 1), np.float32), train=False)
    return scan.Run(
        config, RESULTS, RULES | {'scans': {'rule': 'top-3', **RULES}}, (Member(EXTRACTOR, variables, None, None),)
    )


class Threads:
    """joblib with threads in place of processes, which would load jax anew."""

    @pytest.fixture(autouse=True)
    def _use_threads(self, run, monkeypatch):
        monkeypatch.setattr(archive, 'load_run', lambda workdir: run)
        monkeypatch.setattr(archive, 'BACKEND', 'threading')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Five scans in four layouts, and three failures."""
    root = tmp_path_factory.mktemp('source') / 'pacs'
    for number in range(3):
        hu = np.roll(HU, number, axis=2)
        write_series(root / f'p{number}' / 'CT', hu, study=f'1.2.{number}', series=f'1.2.{number}.1', SOPInstanceUID='')
    two = root / 'both kernels'
    write_series(two, HU, ConvolutionKernel='B30f')
    sharp = root / 'sharp'
    write_series(sharp, HU - 10, ConvolutionKernel='B70f')
    for file in sharp.iterdir():
        file.rename(two / f'S{file.name}')
    sharp.rmdir()
    broken = write_series(root / 'broken', HU, study='1.3', series='1.3.1')
    first = min(broken.iterdir())
    first.write_bytes(first.read_bytes()[:-3000])
    (root / 'cut.zip').write_bytes(b'PK\3\4 and no more')
    write_series(root / 'belly', HU, study='1.4', series='1.4.1', BodyPartExamined='ABDOMEN')
    write_series(root / 'scout', HU[:2], study='1.5', series='1.5.1', ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])
    solid = np.where(HU < -950, HU, np.int16(40))
    write_series(root / 'no lungs', solid, study='1.6', series='1.6.1')
    write_images(root / 'pictures', apply_window(HU[:3]))
    (root / 'readme.txt').write_text('hello')
    return root


@pytest.fixture
def tree(source, tmp_path):
    """A copy that a test may change; writing the scans takes longer than copying them."""
    return shutil.copytree(source, tmp_path / 'pacs')


TABLES = ('predictions.csv', 'failures.csv')


@pytest.fixture(scope='module')
def expected(source, run, tmp_path_factory):
    """The tables of the whole tree."""
    folder = tmp_path_factory.mktemp('expected')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, 'load_run', lambda workdir: run)
        patch.setattr(archive, 'BACKEND', 'threading')
        archive.predict_archive(folder, source, folder / 'out', pages='none')
    return {name: read(folder / 'out' / name) for name in TABLES}


PATHS = ['both kernels', 'both kernels', 'p0/CT', 'p1/CT', 'p2/CT']


def read(path, without=('seconds',)):
    with path.open() as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


class TestDicom(Threads):
    def test_every_scan_gets_its_results_and_a_refused_one_a_report(self, tmp_path, tree, capsys):
        pytest.importorskip('highdicom', reason='DICOM results need covidjax[dicom]')
        for name in ('p1', 'p2'):
            shutil.rmtree(tree / name)
        out = tmp_path / 'out'
        archive.predict_archive(tmp_path, tree, out, pages='none', dicom=True)
        # Those of p0 have no SOP Instance UIDs; 'no lungs' is refused, and 'broken' can't be decoded.
        ids = {row['path']: row['id'] for row in read(out / 'predictions.csv')}
        assert not (out / ids['p0/CT'] / 'dicom').exists()
        found = {}
        for file in out.glob('*/dicom/*.dcm'):
            found.setdefault(file.parts[-3], []).append(file.stem)
        assert len(found) == 4
        assert {tuple(sorted(names)) for names in found.values()} == {('page', 'report'), ('report',)}
        assert [sorted(names) for name, names in found.items() if name == ids['both kernels']] == [['page', 'report']]
        assert '; 1 without DICOM results' in capsys.readouterr().out
        with pytest.raises(UserError, match='pass --dicom'):
            archive.predict_archive(tmp_path, tree, out)
        archive.predict_archive(tmp_path, tree, tmp_path / 'plain', pages='none')
        with pytest.raises(UserError, match='without DICOM results'):
            archive.predict_archive(tmp_path, tree, tmp_path / 'plain', dicom=True)


class TestTables(Threads):
    def predict(self, tmp_path, tree, name='out', **options):
        return archive.predict_archive(tmp_path, tree, tmp_path / name, **options)

    def test_every_chest_ct_is_a_row_and_every_refusal_a_failure(self, tmp_path, tree, run, capsys, caplog):
        assert not self.predict(tmp_path, tree, pages='none')
        rows = read(tmp_path / 'out' / 'predictions.csv')
        assert [row['path'] for row in rows] == PATHS
        assert {row['series'] for row in rows[:2]} == {'4a', '4b'}
        failures = {row['path']: row['reason'] for row in read(tmp_path / 'out' / 'failures.csv')}
        assert failures.keys() == {'broken', 'cut.zip', 'no lungs'}
        for path, word in (
            ('broken', 'cannot be decoded'),
            ('cut.zip', 'truncated zip'),
            ('no lungs', 'size of lungs'),
        ):
            assert word in failures[path]
        everything = (tmp_path / 'out' / 'predictions.csv').read_text() + str(failures) + capsys.readouterr().out
        assert not any(value.lower() in (everything + caplog.text).lower() for value in (*IDENTITY.values(), 'secret'))

        # The same numbers as for one scan.
        for row in rows[2:]:
            folder = tmp_path / row['path']
            scan.predict_one(run, tree / row['path'], folder, series=None, force=False)
            alone = json.loads((folder / 'prediction.json').read_text())
            mine = json.loads((tmp_path / 'out' / row['id'] / 'prediction.json').read_text())
            assert row['id'] == alone['input']['sha256'][:16]
            for key in ('probabilities', 'slices', 'verdict', 'left_out', 'rests_on'):
                assert mine[key] == alone[key]
            assert float(row['covid19']) == pytest.approx(alone['probabilities']['covid19'], rel=1e-5)

    def test_what_is_done_is_skipped_and_failures_are_tried_again(self, tmp_path, tree, monkeypatch, capsys):
        self.predict(tmp_path, tree, pages='none')
        before = read(tmp_path / 'out' / 'predictions.csv', without=())
        first = min((tree / 'broken').iterdir())
        first.write_bytes(encode_dicom(make_dicom(HU[0], -5.0 * 20, study='1.3', series='1.3.1')))
        for file in (tree / 'p0' / 'CT').iterdir():
            os.utime(file, (1, 1))  # other times, the same contents: read, but not predicted
        calls = []
        monkeypatch.setattr(
            tasks, 'prepare_scan', lambda v, *a, f=tasks.prepare_scan, **k: calls.append(v) or f(v, *a, **k)
        )
        assert not self.predict(tmp_path, tree, pages='none')
        assert sorted(volume.name for volume in calls) == ['broken', 'no lungs']
        after = read(tmp_path / 'out' / 'predictions.csv', without=())
        assert [row for row in after if row['path'] != 'broken'] == before
        assert [row['path'] for row in read(tmp_path / 'out' / 'failures.csv')] == ['cut.zip', 'no lungs']
        assert '6 scans in' in capsys.readouterr().out

    def test_shards_give_the_same_table(self, tmp_path, tree, expected):
        for shard in ('2/3', '3/3', '1/3'):
            self.predict(tmp_path, tree, 'shards', pages='none', shard=shard)
        assert {name: read(tmp_path / 'shards' / name) for name in TABLES} == expected
        with pytest.raises(UserError, match='--shard=4/3'):
            self.predict(tmp_path, tree, 'shards', shard='4/3')

    def test_pages(self, tmp_path, tree):
        sick = tmp_path / 'paths.txt'
        sick.write_text(f'# two of them\n{tree / "p0"}\n\n{tree / "p1" / "CT"}\n')
        assert self.predict(tmp_path, sick, pages='all')
        rows = read(tmp_path / 'out' / 'predictions.csv')
        assert [row['path'] for row in rows] == [str(tree / 'p0' / 'CT'), str(tree / 'p1' / 'CT')]
        pages = [(tmp_path / 'out' / row['id'] / 'prediction.html').read_text() for row in rows]
        assert 'series 4: 20 slices' in pages[0]
        assert pages[0] != pages[1]
        sick.write_text('/nowhere/at/all\n')
        with pytest.raises(UserError, match='which does not exist'):
            self.predict(tmp_path, sick)

    def test_another_run_needs_another_folder(self, tmp_path, tree, run, monkeypatch):
        self.predict(tmp_path, tree / 'p0', pages='none')
        other = run._replace(rules=RULES)
        monkeypatch.setattr(archive, 'load_run', lambda workdir: other)
        with pytest.raises(UserError, match='holds predictions of another run'):
            self.predict(tmp_path, tree / 'p0', pages='none')

    def test_a_full_disk_loses_no_row(self, tmp_path, tree, expected, monkeypatch):
        append, count = tables.Table.append, []

        def fail(table, values):
            if 'covid19' in values:
                count.append(1)
                if len(count) == 3:
                    raise OSError(28, 'No space left on device')
            append(table, values)

        monkeypatch.setattr(tables.Table, 'append', fail)
        with pytest.raises(UserError, match='no room is left'):
            self.predict(tmp_path, tree, pages='none')
        assert len(read(tmp_path / 'out' / 'predictions.csv')) == 2
        monkeypatch.setattr(tables.Table, 'append', append)
        self.predict(tmp_path, tree, pages='none')
        assert read(tmp_path / 'out' / 'predictions.csv') == expected['predictions.csv']

    def test_a_file_server_that_hangs_costs_one_unit(self, tmp_path, tree, monkeypatch):
        find = tasks.find_scans

        def hang(entries, name, **options):
            if any(str(entry.path).startswith(str(tree / 'p1')) for entry in entries):
                time.sleep(20)
            return find(entries, name, **options)

        monkeypatch.setattr(tasks, 'find_scans', hang)
        monkeypatch.setattr(tasks, 'READ_SECONDS', 5)
        self.predict(tmp_path, tree, pages='none')
        assert 'p1/CT' not in {row['path'] for row in read(tmp_path / 'out' / 'predictions.csv')}
        [reason] = [r['reason'] for r in read(tmp_path / 'out' / 'failures.csv') if r['path'] == 'p1/CT']
        assert 'not read within 5 s' in reason

    def test_two_commands_do_not_share_a_folder(self, tmp_path, tree):
        lock = archive.filelock.FileLock(tmp_path / 'out' / '.state' / 'lock')
        (tmp_path / 'out' / '.state').mkdir(parents=True)
        with lock, pytest.raises(UserError, match='in use by another command'):
            self.predict(tmp_path, tree)


def test_torn_rows_are_cut(tmp_path):
    table = tables.Table(tmp_path / 'a.csv', ('path', 'x'))
    table.append({'path': 'one, "two"\n', 'x': 0.123456789})
    table.append({'path': 'b'})
    data = table.path.read_bytes()
    for size in range(len(data) + 1):
        table.path.write_bytes(data[:size])
        rows = tables.Table(table.path, ('path', 'x')).rows
        expected = [{'path': 'one, "two"', 'x': '0.123457'}, {'path': 'b', 'x': ''}]
        assert rows == expected[: max(0, data[:size].count(b'\n') - 1)]
    table.path.write_bytes(data[:-2])
    tables.Table(table.path, ('path', 'x')).append({'path': 'c'})
    assert [row['path'] for row in tables.read_rows(table.path)] == ['one, "two"', 'c']


def test_batches_that_mix_scans_give_the_outputs_of_each(run):
    rng = np.random.default_rng(0)
    scans = {key: rng.integers(0, 256, (n, 32, 32, 1), dtype=np.uint8) for key, n in enumerate((5, 40, 1, 16, 20))}
    queue, found = OutputQueue([(EXTRACTOR, run.members[0].slice_variables)]), {}
    for key, images in scans.items():
        queue.add(key, images)
        while queue.num_slices >= ROUND_SIZE:
            found |= queue.compute_batch()
    assert len(queue) > 0
    while queue.num_slices:
        found |= queue.compute_batch()
    assert len(queue) == 0
    for key, images in scans.items():
        expected = compute_outputs(EXTRACTOR, run.members[0].slice_variables, images)
        jax.tree.map(np.testing.assert_array_equal, found[key], (expected,))


def test_units_are_found_by_headers(tmp_path):
    write_series(tmp_path / 'a' / 'x', HU[:10], study='1.2', series='1.2.1')
    write_series(tmp_path / 'a' / 'y', HU[10:], study='1.2', series='1.2.1', heights=-50 - 5.0 * np.arange(10))
    write_series(tmp_path / 'b' / 'x', HU, study='1.3', series='1.3.1')
    write_series(tmp_path / 'b' / 'y', HU, study='1.3', series='1.3.1')  # exported twice
    write_series(tmp_path / 'c' / 'x', HU, study='', series='')
    write_series(tmp_path / 'c' / 'y', HU, study='', series='')  # another patient may hide behind no UID
    (tmp_path / 'd').mkdir()
    create_nifti(HU).to_filename(tmp_path / 'd' / 'scan.nii.gz')
    found = units.list_units(tmp_path)
    assert [(unit.name, len(unit.more)) for unit in found] == [
        ('a/x', 1),
        ('b/x', 1),
        ('c/x', 0),
        ('c/y', 0),
        ('d/scan.nii.gz', 0),
    ]
    recipe = tasks.Recipe(32, 'body', 1, False)
    counts = {}
    for unit in found:
        result = tasks.prepare_unit(unit, recipe, frozenset(), force=False, maker=None, main_pid=None)
        assert result.refusals == []
        counts |= {scan.path: len(scan.scan.boxes) for scan in result.scans}
    assert counts == {'a/x': 20, 'b/x': 20, 'b/y': 20, 'c/x': 20, 'c/y': 20, 'd/scan.nii.gz': 20}


def test_no_scan_vanishes(tmp_path):
    pieces = write_series(tmp_path / 'pieces', HU, study='1.8', series='1.8.1')
    for number, file in enumerate(sorted(pieces.iterdir())):
        if number:
            file.write_bytes(file.read_bytes().replace(b'DS', b'XX'))
    named = write_series(tmp_path / 'named as pictures', HU)
    for file in named.iterdir():
        file.rename(file.with_suffix('.jpg'))
    recipe, results = tasks.Recipe(32, 'body', 1, False), {}
    for unit in units.list_units(tmp_path):
        results[unit.name] = tasks.prepare_unit(unit, recipe, frozenset(), force=False, maker=None, main_pid=None)
    [refusal] = results['pieces'].refusals
    assert refusal.reason == '1 axial CT slices that make no series of 3, and 19 damaged'
    assert len(results['named as pictures'].scans) == 1


def test_a_worker_that_dies_costs_the_unit_that_killed_it():
    names = ['a', 'b', 'bad', 'c', 'd', 'e']
    todo = [units.Unit(name, None, (), '') for name in names]
    pool = archive._Pool(todo, None, lambda unit: joblib.delayed(crashing.read)(unit), with_pages=False)
    outcomes = {task.unit.name: result for task, result in pool.run(lambda _: None, lambda: 0)}
    assert outcomes.keys() == set(names)
    assert all(result.scans == [name] for name, result in outcomes.items() if name != 'bad')
    [refusal] = outcomes['bad'].refusals
    assert 'a worker died while it read this' in refusal.reason


def test_workers_are_kept_while_they_grow_to_the_size_of_their_work():
    """Otherwise loky replaces a worker after a few scans, and the next one loads the libraries of pages again."""
    todo = [units.Unit(f'unit {number}', None, (), '') for number in range(6)]
    pool = archive._Pool(todo, None, lambda unit: joblib.delayed(crashing.grow)(unit), with_pages=False)
    pids = {result.scans[0] for _, result in pool.run(lambda _: None, lambda: 0)}
    assert len(pids) <= max(2, joblib.cpu_count())


def test_a_cluster_gives_the_same_table(tmp_path, tree, run, expected, monkeypatch):
    distributed = pytest.importorskip('distributed')
    monkeypatch.setattr(archive, 'load_run', lambda workdir: run)
    monkeypatch.setattr(tasks, '_load_run', lambda workdir: run)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, protocol='tcp', host='127.0.0.1'
    ) as cluster:
        archive.predict_archive(tmp_path, tree, tmp_path / 'dask', pages='none', scheduler=cluster.scheduler_address)
    assert {name: read(tmp_path / 'dask' / name) for name in TABLES} == expected


def test_flags_of_the_command_line(tmp_path):
    from covidjax import cli

    defaults = dict.fromkeys(('series', 'pages', 'shard', 'scheduler', 'output', 'archive'))
    values = functools.partial(
        types.SimpleNamespace, **defaults | {'workdir': str(tmp_path), 'force': False, 'masks': False, 'dicom': False}
    )
    with pytest.raises(UserError, match='needs --output'):
        cli._predict_archive(_set(values(), archive='x', input=[]), tmp_path)
    with pytest.raises(UserError, match='takes no --input'):
        cli._predict_archive(_set(values(), archive='x', input=['y']), tmp_path)


def _set(values, **changes):
    vars(values).update(changes)
    return values
