"""A run on data from outside: lists with and without classes, scans by CSV, subgroups, and what is refused."""

import csv
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from covidjax.configs import att2, seq
from covidjax.data import covidx_ct
from covidjax.data.lists import CLASSES
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.data.scan.volume import read_volume
from covidjax.data.sequences import group_scans
from covidjax.errors import UserError
from covidjax.evaluation.calibration import apply_temperature
from covidjax.evaluation.novelty import fit_novelty
from covidjax.evaluation.outputs import compute_outputs
from covidjax.evaluation.predictions import softmax, write_predictions
from covidjax.evaluation.screening import fit_rules
from covidjax.evaluation.sick import compute_sick, join, join_logits
from covidjax.evaluation.summary import summarise
from covidjax.evaluation.voting import compute_vote_logits, fit_vote_rules
from covidjax.experiment import common, scans, slices
from covidjax.experiment import external as writing
from covidjax.experiment.config import save_config
from covidjax.experiment.runs import Member, Run, compute_member_outputs
from covidjax.experiment.sick import Judge, create_columns
from covidjax.files import write_json
from covidjax.models.lesion_weights import LesionModel
from covidjax.models.lesions import LesionNet
from covidjax.predict import external
from covidjax.predict.scan import classify_sequence, predict_scan
from tests.scan_files import make_chest, write_series
from tests.variables import draw_variables

SIZE = 32


def write_raw(folder, seed, counts=(9, 6, 9)):
    num_train, num_val, num_test = counts
    options = PhantomOptions(
        seed=seed, num_train=num_train, num_val=num_val, num_test=num_test, image_size=64, min_slices=6, max_slices=9
    )
    write_phantoms(folder, options)
    return folder


def get_list(folder, split='test'):
    return folder / f'{split}_COVIDx_CT-2A.txt'


def keep(folder, split, is_kept):
    """Keeps the lines of a list whose fields pass."""
    lines = [line for line in get_list(folder, split).read_text().splitlines() if is_kept(*line.split()[:2])]
    get_list(folder, split).write_text('\n'.join(lines) + '\n')


def shrink(config, raw_dir, prepared):
    config.data.update(raw_dir=str(raw_dir), image_size=SIZE, prepared_dir=str(prepared))
    model = config.model if config.name == 'att2' else config.att2.model
    model.update(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1, pretrained='')
    return config.lock()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Folders of the run's data, of outside data and of prepared slices."""
    parent = tmp_path_factory.mktemp('data')
    return write_raw(parent / 'inside', 0), write_raw(parent / 'outside', 1), parent / 'prepared'


@pytest.fixture(scope='module')
def slice_run(folders, tmp_path_factory):
    """A slice run with random weights, and its workdir; its files are those of a run that was trained."""
    config = shrink(att2.get_config('x').unlock(), folders[0], folders[2])
    workdir = tmp_path_factory.mktemp('runs') / 'att2'
    workdir.mkdir()
    data = covidx_ct.prepare(str(folders[0]), image_size=SIZE, prepared_dir=str(folders[2]))
    model = slices.create_model(config.model)
    variables = draw_variables(model, jnp.zeros((1, SIZE, SIZE, 1)), train=False, full=True)
    outputs = {
        split: compute_outputs(model, variables, np.stack([source[i]['image'] for i in range(len(source))]))
        for split, source in data.sources.items()
    }
    labels = {split: np.array([row.label for row in rows]) for split, rows in data.rows.items()}
    patients = {split: [row.patient for row in rows] for split, rows in data.rows.items()}
    rules = fit_rules(outputs['val'].logits, labels['val'], patients['val'], CLASSES)
    rules['scans'] = fit_vote_rules(outputs['val'].logits, group_scans(data.rows['val']), rules['temperature'])
    results = write_run(workdir, config, data, rules, outputs['test'].logits, labels, patients)
    rows = data.rows['test']
    names = {'file': [r.file for r in rows], 'scan': [r.scan for r in rows], 'patient': patients['test']}
    write_test(workdir, names, labels['test'], outputs['test'].logits)
    novelty = fit_novelty(outputs['val'].statistics, patients['val'])
    return Run(config, results, rules, (Member(model, variables, None, novelty),)), workdir


def write_run(workdir, config, data, rules, logits, labels, patients):
    results = {
        **common.describe_data(config.data, data),
        'model': 'a model (slices)',
        **summarise(
            rules, logits, labels['test'], patients['test'], CLASSES, baselines={}, train_shares_K=[0.3, 0.3, 0.4]
        ),
        'training': {
            'pretrained': 'none',
            'num_epochs': 1,
            'best_epoch': 1,
            'best_val_loss': 1.0,
            'num_steps': 1,
            'seconds': 1.0,
        },
        'environment': common.describe_environment(),
    }
    save_config(workdir, config)
    write_json(workdir / 'results.json', results)
    write_json(workdir / 'calibration.json', rules)
    return results


def write_test(workdir, names, labels, logits, others=None):
    columns = {**names, 'label': labels.tolist(), **(others or {})}
    columns |= {f'p_{name}': p for name, p in zip(CLASSES, softmax(logits).T, strict=True)}
    write_predictions(workdir / 'predictions.csv', columns)


@pytest.fixture(scope='module')
def scan_run(folders, slice_run, tmp_path_factory):
    """A scan run with random weights on that slice model, and its workdir."""
    of_slices, _ = slice_run
    config = seq.get_config('x').unlock()
    config.data.min_slices = 1
    config = shrink(config, folders[0], folders[2])
    workdir = tmp_path_factory.mktemp('runs') / 'seq'
    workdir.mkdir()
    model = scans.create_model(config)
    drawn = draw_variables(model, jnp.zeros((1, SIZE, SIZE, 1)), jnp.ones(1, jnp.int32), seed=1)
    member = dataclasses.replace(of_slices.members[0], sequence=drawn['params']['sequence'])
    run = of_slices._replace(config=config, members=(member,))
    data = covidx_ct.prepare(str(folders[0]), image_size=SIZE, prepared_dir=str(folders[2]))
    logits, labels, patients, names = {}, {}, {}, {}
    for split in ('val', 'test'):
        chosen = group_scans(data.rows[split])
        images = [np.stack([data.sources[split][i]['image'] for i in scan.records]) for scan in chosen]
        logits[split] = np.stack([classify_sequence(run, compute_member_outputs(run, x))[0] for x in images])
        labels[split] = np.array([scan.label for scan in chosen])
        patients[split] = [scan.patient for scan in chosen]
        names[split] = {'scan': [scan.scan for scan in chosen], 'patient': patients[split]}
    rules = fit_rules(logits['val'], labels['val'], patients['val'], CLASSES)
    results = write_run(workdir, config, data, rules, logits['test'], labels, patients)
    taking_part = {'train': dict.fromkeys(CLASSES, 3)}
    results |= {'model': 'a model (scans)', 'scans': {'taking_part': taking_part}}
    write_test(workdir, names['test'], labels['test'], logits['test'])
    return run._replace(results=results, rules=rules), workdir


@pytest.fixture(scope='module')
def judge(folders):
    """Judges the data of the run by a lesion model with random weights."""
    model = LesionNet(mirror=False)
    variables = draw_variables(model, jnp.zeros((1, SIZE, SIZE, 1)), train=False)
    lesions = LesionModel('a model', model, variables, SIZE, 0.5, '', 'd' * 64, 'some slices')
    return Judge(lesions, covidx_ct.prepare(str(folders[0]), image_size=SIZE, prepared_dir=str(folders[2])))


def add_lesions(run_and_workdir, judge, name, tmp_path_factory):
    """Returns a run with a lesion model, and its workdir."""
    run, workdir = run_and_workdir
    workdir = shutil.copytree(workdir, tmp_path_factory.mktemp('runs') / name)
    data, found = judge._data, {}
    for split in ('val', 'test'):
        source, whole = data.sources[split], group_scans(data.rows[split])
        images = np.stack([source[i]['image'] for i in range(len(source))])
        if run.is_scan_run:
            of_scans = [compute_member_outputs(run, images[list(scan.records)]) for scan in whole]
            logits = np.stack([classify_sequence(run, one)[0] for one in of_scans])
            sick, examples = judge.compute_scan_sick(whole, split), whole
        else:
            logits = compute_member_outputs(run, images)[0].logits
            sick, examples = judge.compute_slice_sick(split), data.rows[split]
        found[split] = common.Predictions(join_logits(sick, logits), logits, sick), examples
    val, of_val = found['val']
    labels, patients = (np.array([getattr(one, field) for one in of_val]) for field in ('label', 'patient'))
    rules = fit_rules(val.logits, labels, patients.tolist(), CLASSES)
    if not run.is_scan_run:
        whole = group_scans(data.rows['val'])
        rules['scans'] = fit_vote_rules(val.classifier, whole, 1.25, judge.compute_scan_sick(whole, 'val'))
    rules['sick'] = judge.describe(1.25)
    test, examples = found['test']
    others = create_columns(test)
    if not run.is_scan_run:
        others |= dict(zip(('lungs_area', 'lesions_area', 'lesions_peak'), judge.get_found('test'), strict=True))
    names = {field: [getattr(one, field) for one in examples] for field in ('scan', 'patient')}
    write_test(workdir, names, np.array([one.label for one in examples]), test.logits, others)
    return run._replace(rules=rules, lesions=judge.lesions), workdir


@pytest.fixture(scope='module')
def slice_run_on_lesions(slice_run, judge, tmp_path_factory):
    return add_lesions(slice_run, judge, 'att2-lesions', tmp_path_factory)


@pytest.fixture(scope='module')
def scan_run_on_lesions(scan_run, judge, tmp_path_factory):
    return add_lesions(scan_run, judge, 'seq-lesions', tmp_path_factory)


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Tests a run on other data, in a copy of its workdir; returns results.json and the folder.

    Unless `whole`, what takes seconds is left out: the page, and the baselines fitted outside.
    """

    def call(run_and_workdir, path, split='test', *, whole=False):
        run, workdir = run_and_workdir
        if not whole:
            monkeypatch.setattr(writing, 'write_external_report', lambda *_: None)
            monkeypatch.setattr(writing, 'score_own_baselines', lambda _: {})
        copy = tmp_path / 'run'
        if not copy.exists():
            shutil.copytree(workdir, copy)
        monkeypatch.setattr(external, 'load_run', lambda _: run)
        external.evaluate_external(copy, path, split)
        [folder] = {p.parent for p in copy.glob('external/*/results.json')} - call.seen
        call.seen.add(folder)
        return json.loads((folder / 'results.json').read_text()), folder

    call.seen = set()
    return call


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_lists_of_another_seed(slice_run, folders, evaluate, capsys):
    results, folder = evaluate(slice_run, folders[1], whole=True)
    rows = read_csv(folder / 'predictions.csv')
    assert folder.name == 'outside'
    assert results['num_examples'] == len(rows) == len(get_list(folders[1]).read_text().splitlines())
    assert results['shared'] == {'patients': 'none', 'pictures': 'none'}
    assert list(results['baselines']) == ['majority class', 'file names only', 'thumbnail ridge']
    assert set(results['own_baselines']) == {'file names only', 'thumbnail ridge'}
    # The scores are those of the predictions, and the inside ones those of the run.
    p = np.array([[float(row[f'p_{name}']) for name in CLASSES] for row in rows])
    labels = np.array([int(row['label']) for row in rows])
    assert results['accuracy'] == pytest.approx((p.argmax(1) == labels).mean())
    score = results['comparison']['scores']['accuracy']
    assert score['outside']['value'] == results['accuracy']
    assert score['inside']['value'] == pytest.approx(slice_run[0].results['accuracy'])
    for target in ('covid19', 'disease'):
        point = results['screening']['operating_points'][target]
        assert point['threshold'] == slice_run[0].rules['thresholds'][target]['threshold']
    assert results['comparison']['scores']['unusual']['inside']['value'] is not None
    assert set(results['subgroups']['columns']) == {'source', 'number of slices'}
    page = (folder / 'report.html').read_text()
    for section in ('comparison', 'own-baselines', 'refit', 'own-shares', 'subgroups', 'data'):
        assert f'<section id="{section}">' in page
    assert 'outside: accuracy' in (folder.parents[1] / 'checklist.html').read_text()
    assert 'outside less inside' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['slice_run', 'slice_run_on_lesions', 'scan_run', 'scan_run_on_lesions'])
def test_the_run_on_its_own_list_gives_its_own_predictions(name, folders, evaluate, monkeypatch, request):
    monkeypatch.setattr(external, 'refuse_shared_patients', lambda *_: None)
    monkeypatch.setattr(external, 'refuse_shared_pictures', lambda *_, **__: None)
    run = request.getfixturevalue(name)
    results, folder = evaluate(run, folders[0])
    ours, theirs = (read_csv(path / 'predictions.csv') for path in (run[1], folder))
    assert [row['scan'] for row in ours] == [row['scan'] for row in theirs]
    for name in CLASSES:
        np.testing.assert_allclose(*([float(row[f'p_{name}']) for row in rows] for rows in (ours, theirs)), atol=1e-6)
    # Random weights give nearly equal probabilities; that predictions.csv rounds them decides a few ranks.
    tolerance = 0.01 if run[0].lesions else 1e-6
    for score in results['comparison']['scores'].values():
        if score['note'] == '' and score['interval']:
            assert score['difference'] == pytest.approx(0, abs=tolerance)


def test_a_class_is_absent_and_an_image_unreadable(slice_run, folders, evaluate, tmp_path):
    raw = shutil.copytree(folders[1], tmp_path / 'part')
    get_list(raw, 'train').unlink()
    get_list(raw, 'val').unlink()
    keep(raw, 'test', lambda _, label: label != '1')
    file = get_list(raw).read_text().split()[0]
    (raw / '2A_images' / file).write_bytes(b'no image')
    results, folder = evaluate(slice_run, raw, whole=True)
    assert results['left_out'] == [{'name': file, 'reason': 'not an image'}]
    assert results['comparison']['absent'] == ['pneumonia']
    assert 'no pneumonia in these data' in results['warnings']
    page = (folder / 'report.html').read_text()
    assert page.count('no pneumonia in these data') >= 3
    assert 'No pneumonia in these data.' in page
    assert results['screening']['prior_correction']['before'] is None


def test_all_lists_or_the_one_that_is_there(slice_run, folders, evaluate, tmp_path):
    raw = shutil.copytree(folders[1], tmp_path / 'val-only')
    get_list(raw, 'train').unlink()
    get_list(raw, 'test').unlink()
    with pytest.raises(UserError, match='no test list, only val: pass --split=all'):
        evaluate(slice_run, raw)
    results, folder = evaluate(slice_run, raw, 'all')
    assert folder.name == 'val-only-all'
    assert list(results['dataset']['slices']) == ['val']
    results, _ = evaluate(slice_run, folders[1], 'all')
    assert list(results['dataset']['slices']) == ['train', 'val', 'test']
    total = sum(len(get_list(folders[1], split).read_text().splitlines()) for split in ('train', 'val', 'test'))
    assert results['num_examples'] == total


def test_two_folders_of_one_name_are_kept_apart(slice_run, folders, evaluate, tmp_path):
    (tmp_path / 'other').mkdir()
    second = shutil.copytree(folders[1], tmp_path / 'other' / 'outside')
    _, first = evaluate(slice_run, folders[1])
    _, other = evaluate(slice_run, second)
    assert (first.name, other.name) == ('outside', 'outside-2')


def test_the_same_patients_are_refused_by_name(slice_run, folders, evaluate, tmp_path):
    raw = shutil.copytree(folders[1], tmp_path / 'mixed')
    line = get_list(folders[0], 'train').read_text().splitlines()[0]
    get_list(raw).write_text(get_list(raw).read_text() + line + '\n')
    shutil.copy(folders[0] / '2A_images' / line.split()[0], raw / '2A_images')
    patient = group_scans(covidx_ct.lists.read_lists(str(folders[0]))['train'])[0].patient
    with pytest.raises(UserError, match=f'the same patients: {patient}'):
        evaluate(slice_run, raw)


def test_the_same_pictures_under_another_name_are_refused(slice_run, folders, evaluate, tmp_path):
    raw = shutil.copytree(folders[1], tmp_path / 'copies')
    known = get_list(folders[0], 'train').read_text().split()[0]
    ours = get_list(raw).read_text().split()[0]
    pixels = np.asarray(Image.open(folders[0] / '2A_images' / known)).astype(int)
    Image.fromarray((pixels + 1).clip(0, 255).astype(np.uint8)).save(raw / '2A_images' / ours)
    with pytest.raises(UserError, match=f'the same pictures: {ours} .* = {known} '):
        evaluate(slice_run, raw)


def test_without_the_data_of_the_run(slice_run, folders, evaluate, tmp_path):
    run, workdir = slice_run
    config = run.config.copy_and_resolve_references().unlock()
    config.data.raw_dir = str(tmp_path / 'gone')
    results, _ = evaluate((run._replace(config=config.lock()), workdir), folders[1])
    assert list(results['baselines']) == ['majority class']
    assert results['shared']['pictures'] == 'not checked'
    assert any('not at hand' in warning for warning in results['warnings'])
    assert results['comparison']['scores']['unusual']['note'] == 'not measured inside'


def test_a_scan_run_on_lists(scan_run, folders, evaluate):
    results, folder = evaluate(scan_run, folders[1])
    rows = read_csv(folder / 'predictions.csv')
    assert results['unit'] == 'scans'
    assert len(rows) == results['num_examples'] == 9
    assert 'thumbnail ridge' in results['baselines']


@pytest.fixture(scope='module')
def scan_folder(tmp_path_factory):
    """Five chests in DICOM and a broken one, with labels.csv."""
    folder = tmp_path_factory.mktemp('scans') / 'clinic'
    rng = np.random.default_rng(0)
    lines = ['path,label,patient,sex,age']
    for number, label in enumerate(('normal', 'COVID19', '2', 'normal', '0')):
        hu = make_chest(12) + rng.integers(-20, 21, (12, 64, 64), np.int16)
        write_series(folder / f'scan{number}', hu)
        lines.append(f'scan{number},{label},P{number},{"MF"[number % 2]},{30 + number}')
    (folder / 'broken').mkdir()
    (folder / 'broken' / 'x.dcm').write_bytes(b'no dicom')
    (folder / 'labels.csv').write_text('\n'.join([*lines, 'broken,normal,P9,M,50', 'nowhere,normal,P10,M,50']) + '\n')
    return folder


@pytest.mark.parametrize('name', ['slice_run', 'scan_run', 'slice_run_on_lesions', 'scan_run_on_lesions'])
def test_scans_by_csv(name, scan_folder, evaluate, request):
    results, folder = evaluate(request.getfixturevalue(name), scan_folder)
    rows = read_csv(folder / 'predictions.csv')
    assert [row['path'] for row in rows] == [f'scan{i}' for i in range(5)]
    assert [row['label'] for row in rows] == ['0', '2', '2', '0', '0']
    assert results['split'] == results['unit'] == 'scans'
    assert [one['name'] for one in results['left_out']] == ['broken', 'nowhere']
    assert 'no such file or folder' in results['left_out'][1]['reason']
    assert results['num_left_out'] == results['dataset']['num_dropped'] == 2
    columns = results['subgroups']['columns']
    assert {group['group']: group['num_patients'] for group in columns['sex']['groups']} == {'female': 2, 'male': 3}
    assert [group['group'] for group in columns['thickness']['groups']] == ['above 3.5 mm']
    assert all(group['scores'] is None for group in columns['sex']['groups'])
    assert results['comparison']['absent'] == ['pneumonia']
    assert results['comparison']['scores']['accuracy']['inside']['value'] is not None


def test_votes_inside_are_joined_with_the_lesions_of_the_whole_scan(slice_run_on_lesions, judge):
    run, workdir = slice_run_on_lesions
    side = writing.read_inside_side(run, workdir, 'scans')
    data, whole = judge._data, group_scans(judge._data.rows['test'])
    images = np.stack([one['image'] for one in map(data.sources['test'].__getitem__, range(len(data.rows['test'])))])
    logits = compute_member_outputs(run, images)[0].logits
    rule = run.rules['scans']['rule']
    votes = np.stack([compute_vote_logits(logits[list(scan.records)], 1.25, rule) for scan in whole])
    expected = join(judge.compute_scan_sick(whole, 'test'), softmax(votes))
    np.testing.assert_allclose(softmax(side.logits), expected, atol=1e-6)
    assert side.labels.tolist() == [scan.label for scan in whole]
    (workdir / 'old').mkdir()
    write_test(workdir / 'old', {'scan': side.patients, 'patient': side.patients}, side.labels, side.logits)
    with pytest.raises(UserError, match='of an earlier version: --mode=evaluate writes it again'):
        writing.read_inside_side(run, workdir / 'old', 'scans')


def test_a_scan_run_on_lesions_predicts_the_joined_verdict(scan_run, scan_run_on_lesions, scan_folder):
    run, path = scan_run_on_lesions[0], scan_folder / 'scan1'
    found = predict_scan(run, read_volume(path, with_lungs=True), {}, force=True, path=path, windows=1)
    summary, features = found.summary, found.outlined.features
    images = found.images[..., np.newaxis]
    logits = classify_sequence(scan_run[0], compute_member_outputs(scan_run[0], images))[0][np.newaxis]
    sick = compute_sick(run.sick_rule, features[np.newaxis])
    expected = apply_temperature(np.log(join(sick, softmax(logits))), run.rules['temperature'])[0]
    np.testing.assert_allclose(list(summary['probabilities'].values()), expected, atol=1e-5)
    assert summary['sick']['probability'] == pytest.approx(sick[0])
    alone = apply_temperature(logits, 1.25)[0]  # calibrated on its own
    np.testing.assert_allclose(list(summary['sick']['classifier_alone'].values()), alone, atol=1e-5)


def test_scans_are_scored_as_predict_does(slice_run, scan_folder, evaluate):
    run, _ = slice_run
    _, folder = evaluate(slice_run, scan_folder)
    path = scan_folder / 'scan1'
    predicted = predict_scan(run, read_volume(path), {}, force=False, path=path).summary['probabilities']
    row = read_csv(folder / 'predictions.csv')[1]
    logits = np.log([[float(row[f'p_{name}']) for name in CLASSES]])
    calibrated = softmax(logits / run.rules['scans']['temperature'])[0]
    np.testing.assert_allclose(calibrated, list(predicted.values()), atol=1e-5)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('file,label\na,0\n', 'no column path'),
        ('path,label\n', 'lists no scan'),
        ('path,label\nscan0,3\nscan1,\n', "line 2: label '3' is not normal"),
        ('path,label\nscan0,0\nscan0,1\n', 'line 3: scan0 again'),
        ('path,label\n,0\n', 'line 2: no path'),
        ('path,label\nnowhere,0\n', 'no scan of it can be tested'),
    ],
)
def test_bad_labels_are_one_line(text, words, slice_run, scan_folder, evaluate):
    path = scan_folder / 'bad.csv'
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        evaluate(slice_run, path)
    assert '\n' not in str(caught.value)


def test_wrong_folders_are_one_line(slice_run, evaluate, tmp_path):
    for path, words in ((tmp_path / 'none', 'no such folder'), (tmp_path, 'neither lists')):
        with pytest.raises(UserError, match=words):
            evaluate(slice_run, path)


def test_an_ensemble_of_one_model_twice_is_that_model(slice_run, folders, evaluate, tmp_path):
    run, workdir = slice_run
    twice = run._replace(members=run.members * 2)
    copy = shutil.copytree(workdir, tmp_path / 'twice')
    rows = read_csv(copy / 'predictions.csv')
    logits = np.log([[float(row[f'p_{name}']) for name in CLASSES] for row in rows])
    calibrated = softmax(logits / run.rules['temperature'])
    columns = {name: [row[name] for row in rows] for name in ('file', 'scan', 'patient', 'label')}
    columns |= {f'p_{name}': p for name, p in zip(CLASSES, calibrated.T, strict=True)}
    write_predictions(copy / 'test_predictions.csv', columns)
    (copy / 'predictions.csv').unlink()
    (copy / 'folds.json').write_text(json.dumps({'folds': [1, 2]}))
    ours, _ = evaluate((twice, copy), folders[1])
    shutil.rmtree(tmp_path / 'run')
    evaluate.seen.clear()
    theirs, _ = evaluate(slice_run, folders[1])
    for key, score in ours['comparison']['scores'].items():
        for side in ('inside', 'outside'):
            assert score[side]['value'] == pytest.approx(theirs['comparison']['scores'][key][side]['value'], abs=1e-5)
