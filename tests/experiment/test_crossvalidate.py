"""A cross-validation of tiny models on few phantoms, and what the commands make of it."""

import csv
import dataclasses
import json
import shutil
import types

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy
from sklearn.metrics import roc_auc_score

from covidjax.configs import att2, seq
from covidjax.data.lists import CLASSES
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.errors import UserError
from covidjax.evaluation.calibration import apply_temperature
from covidjax.experiment import common, crossvalidate, slices
from covidjax.experiment.crossvalidate import Division
from covidjax.experiment.export import export_run
from covidjax.experiment.runs import compute_member_outputs, load_run
from covidjax.experiment.workdir import list_folds
from covidjax.models.torch_names import from_torch
from covidjax.predict import scan
from covidjax.training.devices import compile_step
from tests.scan_files import make_chest, write_series


def shrink(config, raw_dir, prepared_dir):
    config.data.image_size = 32
    config.data.prepared_dir = str(prepared_dir)
    of_slices = config.att2 if 'att2' in config else config
    of_slices.model.update(stage_sizes=(1, 1), width=2, block='basic', stem='small', tail_blocks=1, pretrained='')
    of_slices.train.update(batch_size=8, steps_per_epoch=3, num_epochs=1)
    return config


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw') / 'phantoms'
    options = PhantomOptions(num_train=9, num_val=6, num_test=3, image_size=48, min_slices=4, max_slices=6)
    write_phantoms(folder, options)
    return folder


@pytest.fixture(scope='module')
def config(raw_dir, tmp_path_factory):
    return shrink(att2.get_config(str(raw_dir)).unlock(), raw_dir, tmp_path_factory.mktemp('prepared')).lock()


@pytest.fixture(scope='module')
def be_quick(without_pictures):
    """Leaves out what takes most of the time: maps, figures, and compiling a step for every fold."""
    shared = []

    def compile_once(*arguments):
        if not shared:
            shared.append(compile_step(*arguments))
        return shared[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, 'compile_step', compile_once)
        yield


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory, be_quick):
    folder = tmp_path_factory.mktemp('runs') / 'folds'
    assert crossvalidate.crossvalidate(config, folder, division=Division(num_folds=3), fold=2) is None
    assert not (folder / 'results.json').exists()
    assert [(path / 'results.json').exists() for path in list_folds(folder)] == [False, True, False]
    stamp = (folder / 'fold_2' / 'results.json').stat().st_mtime_ns
    crossvalidate.crossvalidate(config, folder, division=Division(num_folds=3))
    assert (folder / 'fold_2' / 'results.json').stat().st_mtime_ns == stamp  # it was not trained again
    return folder


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def get_probabilities(rows):
    return np.array([[float(row[f'p_{name}']) for name in CLASSES] for row in rows])


def test_every_slice_of_the_pool_is_predicted_once_by_the_fold_that_held_it_out(workdir, raw_dir):
    rows = read(workdir / 'predictions.csv')
    listed = [
        line.split()[0]
        for split in ('train', 'val')
        for line in (raw_dir / f'{split}_COVIDx_CT-2A.txt').read_text().splitlines()
    ]
    assert sorted(row['file'] for row in rows) == sorted(listed)
    temperature = json.loads((workdir / 'calibration.json').read_text())['temperature']
    for number, folder in enumerate(list_folds(workdir), start=1):
        of_fold = read(folder / 'predictions.csv')
        own = {row['file']: p for row, p in zip(of_fold, get_probabilities(of_fold), strict=True)}
        mine = [row for row in rows if row['fold'] == str(number)]
        assert {row['file'] for row in mine} == set(own)
        own_temperature = json.loads((folder / 'calibration.json').read_text())['temperature']
        logits = np.log([own[row['file']] for row in mine]) / own_temperature
        np.testing.assert_allclose(get_probabilities(mine), apply_temperature(logits, temperature), atol=1e-5)
    results = json.loads((workdir / 'results.json').read_text())
    out = results['out_of_fold']
    labels = np.array([int(row['label']) for row in rows])
    right = get_probabilities(rows).argmax(1) == labels
    assert out['accuracy'] == pytest.approx(right.mean())
    assert out['num_patients'] == 15
    assert sum(fold['num_patients'] for fold in out['by_fold']) == 15
    by_fold = [right[[row['fold'] == str(k) for row in rows]].mean() for k in (1, 2, 3)]
    assert [fold['accuracy'] for fold in out['by_fold']] == pytest.approx(by_fold)
    assert out['spread']['accuracy']['mean'] == pytest.approx(np.mean(by_fold))
    assert out['spread']['accuracy']['deviation'] == pytest.approx(np.std(by_fold, ddof=1))
    assert list(out['baselines']) == ['majority class', 'file names only', 'thumbnail ridge']
    assert all(row['disagreement'] for row in rows)  # two members did not train on it


def test_the_ensemble_averages_the_members_on_the_test_list(workdir, raw_dir):
    rows = read(workdir / 'test_predictions.csv')
    listed = [line.split()[0] for line in (raw_dir / 'test_COVIDx_CT-2A.txt').read_text().splitlines()]
    assert [row['file'] for row in rows] == listed
    run = load_run(workdir)
    assert len(run.members) == 3
    data = common.load_data(run.config.data, workdir)
    images = np.stack([data.sources['test'][i]['image'] for i in range(len(rows))])
    logits = [
        outputs.logits / member.temperature
        for member, outputs in zip(run.members, compute_member_outputs(run, images), strict=True)
    ]
    expected = apply_temperature(np.mean(logits, axis=0), run.temperature)
    np.testing.assert_allclose(get_probabilities(rows), expected, atol=1e-6)
    results = run.results
    assert results['model'] == 'ResNet50-ATT2 ensemble of 3 (slices)'
    right = expected.argmax(1) == np.array([int(row['label']) for row in rows])
    assert results['accuracy'] == pytest.approx(right.mean()) == results['ensemble']['scores']['accuracy']['ensemble']
    singles = [(np.argmax(x, 1) == np.array([int(row['label']) for row in rows])).mean() for x in logits]
    assert results['ensemble']['scores']['accuracy']['members'] == pytest.approx(singles)
    gain = results['ensemble']['scores']['accuracy']['gain']
    assert gain == pytest.approx(right.mean() - np.mean(singles))


def test_the_page_and_a_second_call(workdir, config, capsys):
    page = (workdir / 'report.html').read_text()
    for words in ('Out-of-fold scores', 'Folds', 'Ensemble', 'Labels that may be wrong', 'which no fold used'):
        assert words in page
    stamp = (workdir / 'results.json').stat().st_mtime_ns
    crossvalidate.crossvalidate(config, workdir, division=Division(num_folds=3))
    assert (workdir / 'results.json').stat().st_mtime_ns == stamp
    shown = capsys.readouterr().out
    assert 'Out of fold, 3 folds by patient' in shown
    assert 'Ensemble on the test list' in shown


def test_evaluation_gives_the_same_again(workdir, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(workdir, copy)
    for name in ('results.json', 'predictions.csv', 'calibration.json', 'report.html'):
        (copy / name).unlink()
    crossvalidate.evaluate(copy)
    for name in ('results.json', 'predictions.csv', 'test_predictions.csv', 'calibration.json'):
        assert (copy / name).read_bytes() == (workdir / name).read_bytes()


def test_sources_left_out(workdir, tmp_path, monkeypatch, capsys):
    # Take every fold for a source: then the same folds leave out each source once.
    copy = tmp_path / 'copy'
    shutil.copytree(workdir, copy)
    record = json.loads((copy / 'folds.json').read_text())
    (copy / 'folds.json').write_text(json.dumps({**record, 'by': 'source'}))
    sources = {patient: f'S{k}' for k, fold in enumerate(record['folds']) for patient in fold['held_out']}
    rows = read(workdir / 'test_predictions.csv')
    sources |= {row['patient']: 'S0' for row in rows}
    monkeypatch.setattr(crossvalidate, 'get_sources', lambda data: sources)
    results = crossvalidate.evaluate(copy)
    first, *others = results['left_out']
    assert first['sources'] == ['S0']
    assert first['left_out']['kind'] == 'AUC'
    assert first['not_scored'] == []
    assert list(first['baselines'])[-2:] == ['silhouette ridge', 'mean grey']
    assert first['baselines']['majority class']['value'] == 0.5
    assert first['lesions'] == ''
    assert first['lungs_seen'] == []
    of_fold = read(workdir / 'fold_1' / 'predictions.csv')
    temperature = json.loads((workdir / 'fold_1' / 'calibration.json').read_text())['temperature']
    sick = 1 - apply_temperature(np.log(get_probabilities(of_fold)), temperature)[:, 0]
    expected = roc_auc_score([row['label'] != '0' for row in of_fold], sick)
    assert first['left_out']['value'] == pytest.approx(expected, abs=1e-3)
    assert first['num_test_patients'] == 3
    inside, left, difference = (first[k]['value'] for k in ('inside_on_test', 'left_out_on_test', 'difference'))
    assert difference == pytest.approx(left - inside)
    assert [row['num_test_patients'] for row in others] == [0, 0]
    assert all(row['difference'] is None for row in others)
    assert 'Sources left out' in (copy / 'report.html').read_text()
    assert 'Without S0: AUC' in capsys.readouterr().out


def join_two_hospitals(config, folder):
    """Returns the config on a copy of the phantoms whose patients come from hospitals A and B by turns."""
    shutil.copytree(config.data.raw_dir, folder)
    head, *lines = (folder / 'metadata.csv').read_text().splitlines()
    lines = [line.replace(',phantom,', f',{"AB"[i % 2]},') for i, line in enumerate(sorted(lines))]
    (folder / 'metadata.csv').write_text('\n'.join([head, *lines]))
    joined = config.copy_and_resolve_references().unlock()
    joined.data.raw_dir = str(folder)
    return joined.lock()


def test_a_fold_trains_a_lesion_model_without_its_sources(config, tmp_path, monkeypatch):
    joined = join_two_hospitals(config, tmp_path / 'raw').copy_and_resolve_references().unlock()
    joined.lesions = str(tmp_path / 'outlines')
    planned, trained = [], []

    def plan(name, left_out):
        planned.append((name, left_out))
        return None if left_out == {'B'} else types.SimpleNamespace(left_out=left_out)

    def train_lesions(of_lesions, folder, pictures, fold):
        trained.append((of_lesions.left_out, folder.name, len(pictures.names), fold))

    monkeypatch.setattr(crossvalidate, 'plan_lesions', plan)
    monkeypatch.setattr(crossvalidate, 'train_lesions', train_lesions)
    train = types.SimpleNamespace(train=lambda of_fold, folder: trained.append((of_fold.lesions, folder.name)))
    monkeypatch.setitem(crossvalidate.EXPERIMENTS, 'att2', train)
    folder, division = tmp_path / 'folds', Division('source')
    for number in (1, 2):
        crossvalidate.crossvalidate(joined.lock(), folder, division=division, fold=number)
    rows = [row for part in common.load_data(joined.data, tmp_path).rows.values() for row in part]
    assert planned == [(joined.lesions, {name}) for name in 'ABAB']  # once before anything is trained
    assert trained == [
        ({'A'}, 'lesions', sum(row.source == 'A' for row in rows), 'without A'),
        (str(folder / 'fold_1' / 'lesions'), 'fold_1'),
        (joined.lesions, 'fold_2'),
    ]


def test_pictures_on_both_sides_are_refused(config, tmp_path):
    joined = join_two_hospitals(config, tmp_path / 'raw')
    rows = [row for part in common.load_data(joined.data, tmp_path).rows.values() for row in part]
    ours, theirs = (next(row.file for row in rows if row.source == name and row.label == 2) for name in 'AB')
    shutil.copyfile(tmp_path / 'raw' / '2A_images' / ours, tmp_path / 'raw' / '2A_images' / theirs)
    with pytest.raises(
        UserError, match=f'^without A: other sources have the same pictures: {ours} .* = {theirs} '
    ) as caught:
        crossvalidate.crossvalidate(joined, tmp_path / 'folds', division=Division('source'))
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'folds' / 'folds.json').exists()


def test_an_ensemble_of_lesion_models_predicts_nothing(workdir, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(workdir, copy)
    stored = json.loads((copy / 'config.json').read_text())
    (copy / 'config.json').write_text(json.dumps({**stored, 'lesions': 'box'}))
    with pytest.raises(UserError, match='each of its folds has a lesion model and a rule of its own'):
        load_run(copy)


def test_a_fold_is_a_workdir_of_its_own(workdir):
    folder = workdir / 'fold_1'
    before = json.loads((folder / 'results.json').read_text())
    assert before['data'] == 'COVIDx CT-2A layout, fold 1 of 3'
    slices.evaluate(folder)
    after = json.loads((folder / 'results.json').read_text())
    for results in (before, after):
        del results['training']['test_seconds']
    assert after == before
    assert len(load_run(folder).members) == 1


def test_predictions_tell_how_far_the_members_disagree(workdir, tmp_path):
    run = load_run(workdir)
    line = scan.predict_one(
        run, write_series(tmp_path / 'scan', make_chest(6)), tmp_path / 'out', series=None, force=True
    )
    summary = json.loads((tmp_path / 'out' / 'prediction.json').read_text())
    members = summary['members']
    p = np.array(members['probabilities'])
    assert p.shape == (3, 3)
    pairs = [np.abs(p[i] - p[j]).sum() / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert members['disagreement'] == pytest.approx(np.mean(pairs))
    assert '3 members' in line or 'members disagree' in line
    assert 'Probabilities by the members' in (tmp_path / 'out' / 'prediction.html').read_text()
    # The evidence of the slices adds up to the logits of the ensemble.
    shares = np.array([s['evidence'] for s in summary['slices']]) + summary['evidence']['bias']
    expected = apply_temperature(shares, run.temperature)
    np.testing.assert_allclose([s['probabilities'] for s in summary['slices']], expected, atol=1e-5)

    def conclude(limit, held):
        rules = json.loads(json.dumps(run.rules))
        rules['scans']['disagreement']['limit'] = limit
        rules['scans']['conformal']['thresholds'] = dict.fromkeys(CLASSES, 0.0) | held
        strict = run._replace(rules=rules, members=tuple(dataclasses.replace(m, novelty=None) for m in run.members))
        scan.predict_one(strict, tmp_path / 'scan', tmp_path / 'strict', series=None, force=True)
        return json.loads((tmp_path / 'strict' / 'prediction.json').read_text())

    held = {summary['class']: 1.0}  # the conformal set holds the called class alone
    assert conclude(1.0, held)['verdict'] == summary['class']
    assert conclude(None, held)['verdict'] == summary['class']
    apart = conclude(members['disagreement'] / 2, held)
    assert apart['verdict'] == 'uncertain'
    assert apart['members']['is_beyond']
    assert 'the members of the ensemble disagree' in (tmp_path / 'strict' / 'prediction.html').read_text()


def test_exports_hold_every_member(workdir, tmp_path):
    run = load_run(workdir)
    export_run(workdir, tmp_path / 'a.safetensors')
    tensors = safetensors.numpy.load_file(tmp_path / 'a.safetensors')
    with safetensors.safe_open(tmp_path / 'a.safetensors', 'numpy') as file:
        temperatures = json.loads(file.metadata()['members'])
    assert temperatures == [member.temperature for member in run.members]
    for number, member in enumerate(run.members, start=1):
        prefix = f'member{number}.'
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        jax.tree.map(np.testing.assert_array_equal, from_torch(own, member.variables), member.variables)
    export_run(workdir, tmp_path / 'a.stablehlo')
    program = jax.export.deserialize(bytearray((tmp_path / 'a.stablehlo').read_bytes()))
    assert program.fun_name == 'ResNet50_ATT2_ensemble_of_3_normal_pneumonia_covid19'
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    outputs = jax.device_get(program.call(images))
    of_members = compute_member_outputs(run, images[..., None])
    logits = np.stack([o.logits / m.temperature for o, m in zip(of_members, run.members, strict=True)])
    np.testing.assert_allclose(outputs['logits'], logits.mean(0), atol=1e-5)
    np.testing.assert_allclose(outputs['probabilities'], apply_temperature(logits.mean(0), run.temperature), atol=1e-5)
    p = [apply_temperature(x, run.temperature) for x in logits]
    pairs = [np.abs(p[i] - p[j]).sum(-1) / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(outputs['disagreement'], np.mean(pairs, axis=0), atol=1e-5)


def test_mistakes(workdir, config, tmp_path, raw_dir):
    with pytest.raises(UserError, match='holds fold 1 of 3 to fold 3 of 3, not fold 1 of 4 to'):
        crossvalidate.crossvalidate(config, workdir, division=Division(num_folds=4))
    with pytest.raises(UserError, match=r'--fold=4: it must be from 1 to 3'):
        crossvalidate.crossvalidate(config, workdir, division=Division(num_folds=3), fold=4)
    other = config.copy_and_resolve_references().unlock()
    other.seed = 5
    with pytest.raises(UserError, match='seed was 0, now 5'):
        crossvalidate.crossvalidate(other.lock(), workdir, division=Division(num_folds=3))
    with pytest.raises(UserError, match='holds a single run'):
        crossvalidate.crossvalidate(config, workdir / 'fold_1', division=Division(num_folds=3))
    with pytest.raises(UserError, match='only 5 patients of train and val are normal: pass --folds=5'):
        crossvalidate.crossvalidate(config, tmp_path / 'many', division=Division(num_folds=9))
    of_scans = seq.get_config(str(raw_dir)).unlock()
    of_scans.extractor = str(workdir / 'fold_1')
    with pytest.raises(UserError, match='trained on patients that the folds hold out'):
        crossvalidate.crossvalidate(of_scans.lock(), tmp_path / 'scans', division=Division(num_folds=3))
    joined = config.copy_and_resolve_references().unlock()
    joined.lesions = 'box'
    with pytest.raises(UserError, match='may have been trained on patients that the folds hold out'):
        crossvalidate.crossvalidate(joined.lock(), tmp_path / 'joined', division=Division(num_folds=3))
    copy = tmp_path / 'copy'
    shutil.copytree(workdir, copy)
    (copy / 'fold_2' / 'results.json').unlink()
    with pytest.raises(UserError, match='fold_2 not finished'):
        crossvalidate.evaluate(copy)
    (copy / 'folds.json').write_text('{')
    with pytest.raises(UserError, match=r'folds\.json is unreadable'):
        load_run(copy)
