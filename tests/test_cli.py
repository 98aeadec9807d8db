"""The commands as a user types them, on small phantoms."""

import csv
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from PIL import Image

from covidjax import cli
from covidjax.data.lists import CLASSES
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.data.preprocess import apply_window, load_slice
from covidjax.evaluation.calibration import apply_temperature
from covidjax.experiment import slices
from covidjax.experiment.config import load_config
from covidjax.models.torch_names import from_torch
from covidjax.training.checkpoints import open_checkpoints
from tests.scan_files import encode_dicom, make_chest, make_dicom, write_images, write_series

ROOT = Path(__file__).parents[1]
TINY = (
    '--config.data.image_size=32',
    '--config.model.stage_sizes=(1,1)',
    '--config.model.width=4',
    '--config.model.block=basic',
    '--config.model.stem=small',
    '--config.model.tail_blocks=1',
    '--config.model.pretrained=',
    '--config.train.batch_size=16',
    '--config.train.steps_per_epoch=4',
    '--config.train.num_epochs=2',
)


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw') / 'phantoms'
    write_phantoms(
        folder, PhantomOptions(num_train=9, num_val=6, num_test=6, image_size=64, min_slices=8, max_slices=20)
    )
    return folder


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    folders = {name: str(tmp_path_factory.mktemp('own')) for name in ('TFDS_DATA_DIR', 'XDG_CACHE_HOME')}
    return {**os.environ, **folders, 'HF_HUB_OFFLINE': '1'}


@pytest.fixture(scope='module')
def call_freshly(environment):
    """Runs main.py in a Python of its own, as a user does."""

    def run(*arguments):
        command = [sys.executable, 'main.py', *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope='module')
def call(environment, tmp_path_factory):
    """Runs main.py in a fork of a process that has imported everything, which takes seconds."""
    outputs = [tmp_path_factory.mktemp('outputs') / name for name in ('stdout', 'stderr')]
    with subprocess.Popen(
        [sys.executable, '-m', 'tests.forks'],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(*arguments, kill_after=None):
            """Returns what `subprocess.run` does; kills the process as soon as the file `kill_after` exists."""
            print(json.dumps([*map(str, outputs), *map(str, arguments)]), file=server.stdin, flush=True)
            process = int(server.stdout.readline())
            if kill_after is not None:
                deadline = time.monotonic() + 200
                while not kill_after.exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                os.kill(process, signal.SIGKILL)
            status = int(server.stdout.readline())
            return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in outputs))

        yield run


@pytest.fixture(scope='module')
def slice_run(call_freshly, raw_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'att2'
    result = call_freshly(f'--config=configs/att2.py:{raw_dir}', f'--workdir={workdir}', *TINY)
    assert result.returncode == 0, result.stderr
    return workdir, result


def assert_one_line_error(result, *words):
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1, result.stderr
    assert 'Traceback' not in result.stderr
    for word in words:
        assert str(word) in errors[0], errors[0]


def test_run_leaves_results_predictions_and_figures(slice_run):
    workdir, result = slice_run
    results = json.loads((workdir / 'results.json').read_text())
    with (workdir / 'predictions.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert results['split'] == 'test'
    assert results['classes'] == ['normal', 'pneumonia', 'covid19']
    assert results['num_examples'] == len(rows) == np.sum(results['confusion_matrix'])
    assert results['num_patients'] == len({row['patient'] for row in rows}) == 6
    assert list(results['baselines']) == ['majority class', 'file names only', 'thumbnail ridge']
    # The table is that of the predictions.
    p = np.array([[float(row[f'p_{name}']) for name in results['classes']] for row in rows])
    labels = np.array([int(row['label']) for row in rows])
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    assert results['accuracy'] == pytest.approx((p.argmax(1) == labels).mean())
    assert [results['per_class'][c]['support'] for c in results['classes']] == np.bincount(labels).tolist()
    for name in ('training_curves.png', 'confusion_matrix.png'):
        with Image.open(workdir / name) as image:
            image.verify()
    assert len((workdir / 'metrics.jsonl').read_text().splitlines()) == 2
    assert list((workdir / 'tensorboard').glob('events*'))
    rules = json.loads((workdir / 'calibration.json').read_text())
    assert rules['temperature'] == results['screening']['calibration']['temperature']
    assert rules['num_examples'] == sum(results['dataset']['slices']['val'].values())
    scored = results['explanations']['localisation']  # the raw directory has masks
    assert scored['num_patients'] == 4
    page = (workdir / 'report.html').read_text()
    for word in ('Table III', 'not a medical device', 'worth', 'Samples', f'{results["accuracy"]:.1%}'):
        assert word in page
    assert 'weighted average' in result.stdout
    assert str(workdir) in result.stdout.splitlines()[-1]


def test_evaluation_gives_the_same_numbers_again_and_scores_other_lesions(slice_run, call, raw_dir):
    workdir, _ = slice_run
    before, predictions = json.loads((workdir / 'results.json').read_text()), (workdir / 'predictions.csv').read_bytes()
    shutil.copytree(workdir, workdir.with_name('copy'))
    lesions = raw_dir.with_name('lesions')
    lesions.mkdir()
    masks = sorted((raw_dir / 'lesion_masks').iterdir())[:3]
    for mask in masks:
        shutil.copy(mask, lesions / f'mask-{mask.name}')
        shutil.copy(raw_dir / '2A_images' / mask.name, lesions)
    lines = [f'{mask.name},mask-{mask.name},covid19' for mask in masks]
    (lesions / 'slices.csv').write_text('\n'.join(['image,lesion,class', *lines]) + '\n')
    result = call('--mode=evaluate', f'--workdir={workdir.with_name("copy")}', f'--outlines={lesions}', '--occlusion')
    assert result.returncode == 0, result.stderr
    after = json.loads((workdir.with_name('copy') / 'results.json').read_text())
    scored = [results['explanations'].pop('localisation') for results in (before, after)]
    assert scored[0]['num_slices'] > scored[1]['num_slices'] == 3
    assert set(scored[1]['maps']) - set(scored[0]['maps']) == {'occlusion'}
    leading = [results['explanations'].pop('leading_map') for results in (before, after)]
    assert [lead['by'] for lead in leading] == ['lesions', 'lesions']
    assert leading[1]['num_slices'] < leading[0]['num_slices'] == scored[0]['num_slices']
    for results in (before, after):
        del results['training']['test_seconds']
    assert after == before
    assert (workdir.with_name('copy') / 'predictions.csv').read_bytes() == predictions


def test_a_finished_run_is_tested_on_other_data(slice_run, call, raw_dir, tmp_path):
    workdir, _ = slice_run
    for name in ('report.html', 'checklist.html', 'preprocessing.json'):
        assert (workdir / name).stat().st_size > 1000
    other = tmp_path / 'other'
    write_phantoms(
        other, PhantomOptions(seed=1, num_train=3, num_val=3, num_test=3, image_size=64, min_slices=8, max_slices=9)
    )
    result = call('--mode=evaluate', f'--workdir={workdir}', f'--data={other}')
    assert result.returncode == 0, result.stderr
    assert 'outside less inside' in result.stdout
    results = json.loads((workdir / 'external' / 'other' / 'results.json').read_text())
    lines = (other / 'test_COVIDx_CT-2A.txt').read_text().splitlines()
    assert (results['num_examples'], results['num_patients']) == (len(lines), 3)
    own = call('--mode=evaluate', f'--workdir={workdir}', f'--data={raw_dir}')
    assert_one_line_error(own, 'the same patients', '6 in all')


def test_finished_run_prints_its_summary_again(slice_run, call, raw_dir):
    workdir, first = slice_run
    stamp = (workdir / 'results.json').stat().st_mtime_ns
    result = call(f'--config=configs/att2.py:{raw_dir}', f'--workdir={workdir}', *TINY)
    assert result.returncode == 0, result.stderr
    assert result.stdout == first.stdout
    assert (workdir / 'results.json').stat().st_mtime_ns == stamp


def test_killed_run_goes_on_and_ends_the_same(slice_run, call, raw_dir, tmp_path):
    whole, _ = slice_run
    workdir = tmp_path / 'killed'
    command = (f'--config=configs/att2.py:{raw_dir}', f'--workdir={workdir}', *TINY)
    killed = call(*command, kill_after=workdir / 'metrics.jsonl')  # the first epoch is saved
    assert killed.returncode == -signal.SIGKILL
    assert not (workdir / 'results.json').exists()
    result = call(*command)
    assert result.returncode == 0, result.stderr
    assert 'going on after epoch ' in result.stderr
    assert (workdir / 'predictions.csv').read_bytes() == (whole / 'predictions.csv').read_bytes()
    epochs = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    expected = [json.loads(line) for line in (whole / 'metrics.jsonl').read_text().splitlines()]
    assert [e['val_loss'] for e in epochs] == [e['val_loss'] for e in expected]


def test_export_has_the_best_model(slice_run, call, tmp_path):
    workdir, _ = slice_run
    result = call('--mode=export', f'--workdir={workdir}', f'--output={tmp_path / "model.safetensors"}')
    assert result.returncode == 0, result.stderr
    config = load_config(workdir)
    with open_checkpoints(workdir) as checkpoints:
        variables = slices.restore_best(config, checkpoints)
    tensors = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors, variables), variables)


def test_exported_program_predicts_as_the_run(slice_run, call, raw_dir, tmp_path):
    workdir, _ = slice_run
    path = tmp_path / 'model.stablehlo'
    result = call('--mode=export', f'--workdir={workdir}', f'--output={path}')
    assert result.returncode == 0, result.stderr
    assert 'uint8[b,32,32]' in result.stdout
    with (workdir / 'predictions.csv').open() as file:
        expected = {row['file']: [float(row[f'p_{name}']) for name in CLASSES] for row in csv.DictReader(file)}
    lines = (raw_dir / 'test_COVIDx_CT-2A.txt').read_text().splitlines()
    images = []
    for file, _, *box in map(str.split, lines):
        images.append(load_slice(str(raw_dir / '2A_images' / file), tuple(map(int, box)), 32))
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    outputs = jax.device_get(program.call(np.stack(images)))
    probabilities = np.array([expected[line.split()[0]] for line in lines])
    np.testing.assert_allclose(jax.nn.softmax(outputs['logits']), probabilities, atol=1e-6)
    temperature = json.loads((workdir / 'calibration.json').read_text())['temperature']
    np.testing.assert_allclose(outputs['probabilities'], apply_temperature(outputs['logits'], temperature), atol=1e-6)
    # The example runs alone, on images that are prepared already.
    Image.fromarray(images[0]).save(tmp_path / 'slice.png')
    command = [sys.executable, '-I', ROOT / 'experiments' / 'run_exported.py', path, tmp_path / 'slice.png']
    example = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert example.returncode == 0, example.stderr
    printed = dict(line.split('\t') for line in example.stdout.splitlines()[1:])
    np.testing.assert_allclose(json.loads(printed['logits'])[0], outputs['logits'][0], atol=2e-6)


def test_predictions_of_scans_and_of_what_is_none(slice_run, call, tmp_path):
    workdir, _ = slice_run
    scan = write_series(tmp_path / 'scan', make_chest(6))
    scout = encode_dicom(make_dicom(make_chest(1)[0], 0.0, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']))
    (tmp_path / 'scout').write_bytes(scout)
    names = [scan, tmp_path / 'scout', write_images(tmp_path / 'images', apply_window(make_chest(6)))]
    result = call('--mode=predict', f'--workdir={workdir}', *(f'--input={name}' for name in names))
    assert_one_line_error(result, 'scout', 'localizers')
    lines = result.stdout.splitlines()
    assert [line.split(':')[0] for line in lines] == ['scan', 'images']
    summaries = []
    for name in ('scan', 'images'):
        folder = workdir / 'predictions' / name
        summaries.append(json.loads((folder / 'prediction.json').read_text()))
        assert 'Along the scan' in (folder / 'prediction.html').read_text()
    assert summaries[0]['slices'][0]['depth_mm'] == 0
    first, second = ([s['probabilities'] for s in summary['slices']] for summary in summaries)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert not (workdir / 'predictions' / 'scout').exists()


def test_sequence_run_stands_alone_beside_the_votes(slice_run, call, raw_dir, tmp_path):
    extractor, workdir = tmp_path / 'extractor', tmp_path / 'seq'
    shutil.copytree(slice_run[0], extractor)
    arguments = (
        f'--config=configs/seq.py:{raw_dir}',
        f'--workdir={workdir}',
        f'--config.extractor={extractor}',
        '--config.data.image_size=32',
        '--config.data.min_slices=1',
        '--config.model.hidden=8',
        '--config.train.batch_size=4',
        '--config.train.num_epochs=1',
    )
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    results = json.loads((workdir / 'results.json').read_text())
    level = results['scan_level']
    assert results['num_examples'] == 6
    assert results['training']['pretrained'] == 'none (from scratch)'
    assert level['vote']['num_examples'] == 6
    assert level['sequence']['confusion_matrix'] == results['confusion_matrix']
    assert results['slice_attention']['auc']['number'] > 0  # the raw directory has masks
    assert 'Table IV' in (workdir / 'report.html').read_text()
    assert level['short_scans']['num_scans'] <= 6
    assert results['scans']['left_out']['test'] == {'normal': 0, 'pneumonia': 0, 'covid19': 0}
    assert 'McNemar' in result.stdout
    assert {m['num_examples'] for m in results['baselines'].values()} == {6}
    with (workdir / 'predictions.csv').open() as file:
        for row in csv.DictReader(file):
            attention = np.array(row['attention'].split(), float)
            assert len(attention) == len(row['slices'].split())
            assert attention.sum() == pytest.approx(1, abs=1e-4)
    # The extractor lies in the checkpoint: its own workdir may go.
    shutil.rmtree(extractor)
    again = call('--mode=evaluate', f'--workdir={workdir}')
    assert again.returncode == 0, again.stderr
    assert json.loads((workdir / 'results.json').read_text())['scan_level'] == level
    exported = call('--mode=export', f'--workdir={workdir}', f'--output={tmp_path / "model.safetensors"}')
    assert exported.returncode == 0, exported.stderr
    names = safetensors.numpy.load_file(tmp_path / 'model.safetensors').keys()
    assert {'extractor.conv1.weight', 'sequence.lstm.weight_ih_l0_reverse', 'sequence.classifier.bias'} <= names


@pytest.fixture
def refuse(environment, monkeypatch):
    """Runs main.py in this process, without its process-wide settings; returns the message with which it ends."""
    for name in ('TFDS_DATA_DIR', 'XDG_CACHE_HOME'):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(cli.app, 'run', lambda main, argv, flags_parser: main(flags_parser(argv)))
    monkeypatch.setattr(cli.signal, 'signal', lambda *_: None)
    for name in ('set_up_log', '_start_jax'):
        monkeypatch.setattr(cli, name, lambda *_: None)

    def run(*arguments):
        monkeypatch.setattr(cli.flags, 'FLAGS', flags.FlagValues())
        monkeypatch.setattr(sys, 'argv', ['main.py', *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / 'main.py'), run_name='__main__')
        return ended.value.code

    return run


@pytest.mark.filterwarnings('ignore:the load_module')  # in ml_collections
def test_user_mistakes_are_one_line_each(refuse, raw_dir, slice_run, tmp_path):
    att2, workdir = f'--config=configs/att2.py:{raw_dir}', f'--workdir={tmp_path / "run"}'
    empty = tmp_path / 'empty'
    empty.mkdir()
    blocked = tmp_path / 'file'
    blocked.write_text('')
    cases = [
        ((f'--config=configs/att2.py:{tmp_path}/none', workdir, *TINY), (f'{tmp_path}/none',)),
        ((f'--config=configs/att2.py:{empty}', workdir, *TINY), (empty, 'train_COVIDx_CT-2A.txt')),
        ((att2, workdir, *TINY, '--config.train.batchsize=3'), ('batchsize',)),
        ((att2, workdir, *TINY, '--config.train.batch_size=many'), ('many',)),
        ((att2, workdir, *TINY, '--config.train.batch_size=-2'), ('train.batch_size=-2',)),
        ((att2, workdir, *TINY, '--config.train.accumulation_steps=3'), ('batch_size=16', '3 parts')),
        ((att2, workdir, *TINY, '--config.data.sources=A, phantom'), ('no source A', 'the lists have phantom')),
        ((att2, workdir, *TINY, '--config.data.balance=patient'), ('data.balance', 'none, class, class_and_source')),
        ((att2, f'--workdir={slice_run[0]}', *TINY, '--config.seed=5'), ('seed was 0, now 5',)),
        ((att2, f'--workdir={blocked}', *TINY), (blocked,)),
        ((att2, f'--workdir={blocked}/below', *TINY), (blocked,)),
        (('--mode=dance', att2), ('dance',)),
        (('--mode=evaluate', f'--workdir={empty}'), (empty, 'not the workdir')),
        (('--mode=evaluate',), ('--workdir',)),
        (('--mode=evaluate', f'--workdir={slice_run[0]}', f'--outlines={empty}'), (empty, 'slices.csv', '--outlines')),
        (('--mode=evaluate', f'--workdir={slice_run[0]}', '--split=all'), ('--split is for --data',)),
        (('--mode=evaluate', f'--workdir={slice_run[0]}', f'--data={empty}', '--occlusion'), ('--occlusion is not',)),
        (('--mode=evaluate', f'--workdir={slice_run[0]}', f'--data={empty}', '--split=val'), ('test or all',)),
        (('--mode=evaluate', f'--workdir={slice_run[0]}', f'--data={empty}'), (empty, 'neither lists', 'labels.csv')),
        (('--mode=evaluate', f'--workdir={slice_run[0]}', f'--data={tmp_path}/none'), (f'{tmp_path}/none',)),
        (('--mode=audit',), ('--input',)),
        (('--mode=audit', f'--input={tmp_path}/none', workdir), (f'{tmp_path}/none',)),
        (('--mode=audit', f'--input={empty}', workdir), (empty, 'train_COVIDx_CT-2A.txt')),
        (('--mode=audit', f'--input={raw_dir}', f'--workdir={blocked}'), (blocked, '--workdir')),
        (('--mode=audit', f'--input={raw_dir}', workdir, f'--predictions={empty}'), (empty, '--predictions')),
        (('--mode=crossvalidate',), ('--config',)),
        (('--mode=crossvalidate', att2, '--by=hospital'), ('--by=hospital', 'patient or source')),
        (('--mode=crossvalidate', att2, '--groups=A'), ('--groups', '--by=source')),
        (('--mode=crossvalidate', att2, '--by=source', '--folds=3'), ('--folds', '--by=patient')),
        (('--mode=crossvalidate', att2, f'--workdir={slice_run[0]}'), (slice_run[0], 'holds a single run')),
        (('--mode=export', f'--workdir={slice_run[0]}'), ('--output',)),
        (('--mode=export', '--output=a.safetensors'), ('--workdir',)),
        (('--mode=export', f'--workdir={slice_run[0]}', f'--output={blocked}'), (blocked, '.safetensors')),
        (('--mode=predict', f'--workdir={slice_run[0]}'), ('--input',)),
        (('--mode=predict', f'--workdir={slice_run[0]}', f'--input={empty}', '--windows=2'), ('--windows=2', '1 or 3')),
        (('--mode=serve', f'--workdir={slice_run[0]}', '--host=0.0.0.0'), ('--host=0.0.0.0', '--token_file')),
        (('--mode=serve', f'--workdir={slice_run[0]}', f'--token-file={empty}/none'), (f'{empty}/none',)),
        (('--mode=serve', f'--workdir={empty}', '--port=0'), (empty, 'not the workdir')),
        (('--mode=predict', f'--workdir={empty}', f'--input={empty}'), (empty, 'not the workdir')),
        ((), ('--config',)),
        ((att2, workdir, *TINY, '--config.name=dance'), ('dance',)),
        (('--config=configs/none.py',), ('configs/none.py',)),
        ((att2, 'stray'), ('stray',)),
        ((att2, f'--workdir={tmp_path / "w"}', *TINY, '--config.model.pretrained=timm/absent'), ('timm/absent',)),
        ((f'--config=configs/seq.py:{raw_dir}', workdir, f'--config.extractor={empty}'), (empty, 'not the workdir')),
        ((f'--config=configs/seq.py:{raw_dir}', workdir, f'--config.extractor={slice_run[0]}'), ('image_size=32',)),
    ]
    for arguments, words in cases:
        message = refuse(*arguments)
        assert message.startswith('error: ')
        assert '\n' not in message
        assert [word for word in words if str(word) not in message] == [], message


def test_mistakes_in_a_fresh_python_are_one_line_each(call_freshly, raw_dir, tmp_path):
    assert_one_line_error(
        call_freshly(f'--config=configs/att2.py:{raw_dir}', '--config.train.batchsize=3'), 'batchsize'
    )
    assert_one_line_error(call_freshly('--mode=evaluate', f'--workdir={tmp_path}'), tmp_path, 'not the workdir')


def test_mistakes_among_several_processes(call, raw_dir):
    hosts = ('--coordinator=localhost:1', '--num_processes=2', '--process_id=2')
    assert_one_line_error(call(f'--config=configs/att2.py:{raw_dir}', *hosts), '--process_id', 'got 2 and 2')


def test_audit_fails_for_broken_data_only(call, raw_dir, tmp_path):
    lists_only = tmp_path / 'lists'
    lists_only.mkdir()
    for path in raw_dir.glob('*.txt'):
        shutil.copy(path, lists_only)
    result = call('--mode=audit', f'--input={lists_only}', f'--workdir={tmp_path / "audit"}')
    assert result.returncode == 0, result.stderr
    assert '0 broken' in result.stdout
    assert str(tmp_path / 'audit' / 'audit.html') in result.stdout.splitlines()[-1]

    train, test = (lists_only / f'{split}_COVIDx_CT-2A.txt' for split in ('train', 'test'))
    leaked = train.read_text().splitlines()[0]
    test.write_text(f'{test.read_text()}{leaked}\n')
    result = call('--mode=audit', f'--input={lists_only}', f'--workdir={tmp_path / "audit"}')
    assert result.returncode == 1
    assert 'Traceback' not in result.stderr
    assert leaked.split()[0] in result.stdout
    assert json.loads((tmp_path / 'audit' / 'audit.json').read_text())['verdict'] == 'broken'


@pytest.mark.filterwarnings('ignore:the load_module')  # in ml_collections
def test_bad_data_are_one_line_each(refuse, call, raw_dir, tmp_path):
    raw = shutil.copytree(raw_dir, tmp_path / 'raw')
    path = raw / 'train_COVIDx_CT-2A.txt'
    lines = path.read_text().splitlines()
    file = lines[10].split()[0]
    bad = ['../up_0001.png 0 0 0 9 9', 'a_0001.png 3 0 0 9 9', 'b_0001.png 0 5 5 5 9', 'c_0001.png 0 0 0 9', lines[0]]
    path.write_text('\n'.join(lines + bad) + '\n')
    command = (f'--config=configs/att2.py:{raw}', f'--workdir={tmp_path / "run"}', *TINY)
    first = len(lines) + 1
    message = refuse(*command)
    assert all(f'{path.name}:{first + i}' in message for i in range(5))
    assert '5 in all' in message

    # One row less is another dataset: what was prepared of the clean one does not count.
    path.write_text('\n'.join(lines[:-1]) + '\n')
    image = raw / '2A_images' / file
    image.write_bytes(image.read_bytes()[:200])
    bomb = raw / '2A_images' / lines[11].split()[0]
    Image.new('1', (20_000, 20_000)).save(bomb)
    message = refuse(*command)
    assert all(word in message for word in (file, bomb.name, 'skip_bad'))

    listed = tmp_path / 'skipped' / 'dropped_images.json'
    call(*command, '--config.data.skip_bad=True', f'--workdir={listed.parent}', kill_after=listed)
    dropped = json.loads(listed.read_text())
    assert {entry['file'] for entry in dropped} == {file, bomb.name}


def test_the_served_prediction_is_that_of_predict(slice_run, call, environment, tmp_path):
    requests = pytest.importorskip('requests')
    pytest.importorskip('starlette', reason='the page needs covidjax[serve]')
    source = write_series(tmp_path / 'source', make_chest())
    result = call('--mode=predict', f'--workdir={slice_run[0]}', f'--input={source}', f'--output={tmp_path / "out"}')
    assert result.returncode == 0, result.stderr
    command = [sys.executable, 'main.py', '--mode=serve', f'--workdir={slice_run[0]}', '--port=0', '--keep-minutes=5']
    with subprocess.Popen(
        command, cwd=ROOT, env=environment | {'TMPDIR': str(tmp_path)}, stdout=subprocess.PIPE, text=True
    ) as server:
        url = f'http://127.0.0.1:{server.stdout.readline().split(":")[2].split("/")[0]}'
        files = [('files', (path.name, path.read_bytes())) for path in source.iterdir()]
        scan = f'{url}/api/scans/{requests.post(f"{url}/api/scans", files=files).json()["id"]}'
        while (state := requests.get(scan).json()['state']) in ('queued', 'running'):
            time.sleep(0.2)
        served = requests.get(f'{scan}/prediction.json').json()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert state == 'done'
    predicted = json.loads((tmp_path / 'out' / 'prediction.json').read_text())
    assert served['probabilities'] == predicted['probabilities']
    assert served['slices'] == predicted['slices']
    assert not list(tmp_path.glob('covidjax-serve-*/server-*'))


def test_help_names_every_mode_and_flag(call_freshly):
    result = call_freshly('--help')
    for word in (
        *(
            '--mode',
            'train|crossvalidate|evaluate|predict|audit|serve|export',
            '--workdir',
            '--input',
            '--output',
            '--outlines',
            '--coordinator',
        ),
        *('configs/att2.py', 'configs/seq.py'),
    ):
        assert word in result.stdout


@pytest.mark.parametrize('arguments', [['help', 'audit'], ['audit', '--help'], ['--help', 'audit'], ['audit', '-h']])
def test_help_of_a_command(arguments, capsys):
    cli.main(['covidjax', *arguments])
    shown = capsys.readouterr().out
    assert shown.startswith('Check whether a dataset can be trusted')
    assert '--input=DIR' in shown


def test_help_of_an_unknown_command():
    with pytest.raises(SystemExit, match="error: unknown command 'dance'"):
        cli.main(['covidjax', 'help', 'dance'])


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_output_that_nobody_reads_ends_quietly(environment, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, 'main.py', '--help']
    environment = {**environment, 'PYTHONUNBUFFERED': unbuffered}
    try:
        result = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, b'')


def test_another_broken_pipe_is_not_hidden():
    with pytest.raises(BrokenPipeError), cli.allow_closed_output():
        raise BrokenPipeError
