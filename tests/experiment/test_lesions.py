import json

import numpy as np
import pytest

from covidjax.configs import lesions as lesions_config
from covidjax.data.masked import read_masked
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.errors import UserError
from covidjax.experiment import lesions
from covidjax.experiment.config import check_config
from covidjax.experiment.export import export_run
from covidjax.experiment.lesions import Drawn, exclude_seen, load_lesions
from covidjax.models import efficientnet


@pytest.fixture(scope='module', autouse=True)
def shallow():
    """Leaves one block of each stage of the backbone: compiling takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet, 'STAGES', [stage._replace(num_blocks=1) for stage in efficientnet.STAGES])
        yield


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
    raw_dir = tmp_path_factory.mktemp('phantoms') / 'raw'
    options = PhantomOptions(num_train=3, num_val=3, num_test=3, image_size=48, min_slices=4, max_slices=4)
    write_phantoms(raw_dir, options)
    return raw_dir


@pytest.fixture(scope='module')
def config(raw_dir):
    config = lesions_config.get_config(str(raw_dir)).unlock()
    config.data.image_size = 32
    config.model.pretrained = ''
    config.model.mirror = False
    config.train.batch_size = 4
    config.train.steps_per_epoch = 2
    config.train.num_epochs = 2
    config.train.checkpoint_steps = 1
    return config.lock()


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'lesions'
    return workdir, lesions.train(config, workdir)


def test_run_writes_its_files(run):
    workdir, results = run
    for name in ('config.json', 'results.json', 'calibration.json', 'predictions.csv', 'report.html', 'metrics.jsonl'):
        assert (workdir / name).exists(), name
    assert json.loads((workdir / 'results.json').read_text()) == json.loads(json.dumps(results))
    history = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [entry['epoch'] for entry in history] == [1, 2]
    assert 0 <= history[-1]['val_dice'] <= 1
    rules = json.loads((workdir / 'calibration.json').read_text())
    assert rules['threshold'] == results['threshold']
    assert results['num_slices'] == 12
    assert results['dataset']['slices']['train'] == {'with lesions': 8, 'without': 4}


def test_finished_run_prints_its_summary_again(run, config, capsys):
    workdir, results = run
    assert lesions.train(config, workdir) == json.loads(json.dumps(results))
    assert 'Dice of lesions' in capsys.readouterr().out


def test_evaluation_repeats_the_test(run):
    workdir, results = run
    before = (workdir / 'predictions.csv').read_bytes()
    again = lesions.evaluate(workdir)
    assert (workdir / 'predictions.csv').read_bytes() == before
    assert again['dice'] == results['dice']


def test_exported_weights_are_those_of_the_run(run, tmp_path):
    workdir, _ = run
    path = tmp_path / 'lesions.safetensors'
    export_run(workdir, path)
    ours, theirs = load_lesions(str(workdir)), load_lesions(str(path))
    assert (theirs.digest, theirs.threshold, theirs.image_size) == (ours.digest, ours.threshold, 32)
    kernel = ours.variables['params']['decoder_0']['kernel']
    np.testing.assert_allclose(theirs.variables['params']['decoder_0']['kernel'], kernel, rtol=1e-3, atol=1e-6)


def test_slices_with_lesions_are_drawn_twice(raw_dir):
    data = read_masked([raw_dir], 32)
    drawn = Drawn(data)
    counts = np.bincount(drawn.places)
    assert counts.tolist() == [2 if row.has_lesion else 1 for row in data.rows['train']]
    np.testing.assert_array_equal(drawn[2]['image'], data.sources['train'][drawn.places[2]]['image'])


def test_slices_that_a_run_has_seen_are_left_out(raw_dir):
    data = read_masked([raw_dir], 32)
    outside, number = exclude_seen(data, data, 'all')
    assert number == 24
    assert outside.rows['test'] == data.rows['test']
    renamed = [row._replace(patient=f'new-{row.patient}') for row in data.rows['train']]
    copies = data._replace(rows={**data.rows, 'test': renamed}, sources={**data.sources, 'test': data.sources['train']})
    with pytest.raises(UserError, match='was trained on all 12 slices'):
        exclude_seen(copies, data, 'test')


def test_other_runs_are_no_lesion_models(run, tmp_path):
    workdir, _ = run
    config = json.loads((workdir / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, 'name': 'other', 'lesions': ''}))
    with pytest.raises(UserError, match='not of configs/lesions'):
        load_lesions(str(tmp_path))


def test_side_must_be_a_multiple_of_32(config):
    bad = config.copy_and_resolve_references().unlock()
    bad.data.image_size = 100
    with pytest.raises(UserError, match='multiple of 32'):
        check_config(bad)
