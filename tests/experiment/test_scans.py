"""A scan run whose verdict stands on lesions; runs without are in tests/test_cli.py."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

import covidjax.report.scans
from covidjax.configs import att2, seq
from covidjax.data import covidx_ct
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.data.sequences import NUM_SLICES, group_scans
from covidjax.errors import UserError
from covidjax.evaluation.calibration import fit_temperature
from covidjax.evaluation.predictions import softmax
from covidjax.evaluation.sick import Found, compute_features, compute_sick, join, parse_rule
from covidjax.experiment import scans, sick, slices
from covidjax.experiment.config import save_config
from tests.variables import draw_variables

SIZE = 32


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Scans of 17 and 18 slices, of which a scan run takes 16."""
    folder = tmp_path_factory.mktemp('scans')
    options = PhantomOptions(
        num_train=6, num_val=6, num_test=6, image_size=64, min_slices=NUM_SLICES + 1, max_slices=NUM_SLICES + 2
    )
    write_phantoms(folder / 'raw', options)
    return covidx_ct.prepare(folder / 'raw', image_size=SIZE, prepared_dir=str(folder / 'prepared'))


@pytest.fixture
def config(data):
    config = seq.get_config(str(data.raw_dir)).unlock()
    config.data.image_size = SIZE
    config.att2.model.update(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1, pretrained='')
    config.model.hidden = 4
    return config.lock()


@pytest.fixture
def outlined(data, monkeypatch):
    """What is found in the slices of each split, in place of what a model would find."""
    rng = np.random.default_rng(0)
    found = {}
    for split, rows in data.rows.items():
        lesions = rng.uniform(0, 30, len(rows)) * np.array([row.label != 0 for row in rows])
        found[split] = Found(np.full(len(rows), 100.0), lesions, lesions / 40)
    model = types.SimpleNamespace(name='box', digest='d', threshold=0.5)
    monkeypatch.setattr(sick, 'load_lesions', lambda name: model)
    monkeypatch.setattr(sick, 'measure_split', lambda lesions, data, split: found[split])
    return found


def test_the_lesions_decide_on_sick_and_the_sequence_model_on_the_disease(
    data, config, outlined, tmp_path, monkeypatch
):
    monkeypatch.setattr(covidjax.report.scans, 'build_scan_sections', lambda *_: [])
    variables = draw_variables(scans.create_model(config), jnp.zeros((1, SIZE, SIZE, 1)), jnp.ones(1, jnp.int32))
    alone = scans.create_experiment(config, data, tmp_path)
    joined = scans.create_experiment(
        config.copy_and_resolve_references(), data, tmp_path, sick.create_judge('box', data)
    )
    of_alone, predictions = (
        {split: one.predict(variables, split) for split in ('val', 'test')} for one in (alone, joined)
    )
    assert of_alone['test'].sick is None
    found = predictions['test']
    np.testing.assert_array_equal(found.classifier, of_alone['test'].logits)
    # The model sees 16 slices of a scan, the lesions are those of all.
    whole = group_scans(data.rows['test'])
    assert {len(scan.records) for scan in whole} <= {17, 18}
    assert {len(scan.records) for scan in joined.examples['test']} == {16}
    features = np.stack([compute_features(outlined['test'].select(scan.records)) for scan in whole])
    findings = joined.examine(variables, predictions, {})
    rule = findings.rules['sick']
    expected = compute_sick(parse_rule(rule), features)
    np.testing.assert_allclose(found.sick, expected)
    np.testing.assert_allclose(softmax(found.logits), join(expected, softmax(found.classifier)))
    assert rule['digest'] == 'd'
    labels = np.array([scan.label for scan in joined.examples['val']])
    assert rule['classifier_temperature'] == fit_temperature(predictions['val'].classifier, labels)
    # The training scans are told apart by their lesions, and so are these.
    verdicts = findings.results['verdicts']
    assert verdicts['val']['both']['sick_auc'] == verdicts['test']['lesions']['sick_auc'] == 1
    accuracy = alone.examine(variables, of_alone, {}).results['scan_level']['sequence']['accuracy']
    assert (
        verdicts['test']['classifier']['accuracy'] == findings.results['scan_level']['sequence']['accuracy'] == accuracy
    )
    assert findings.others['sequence model alone']['accuracy'] == accuracy
    np.testing.assert_allclose(findings.columns['p_normal'], 1 - expected)
    np.testing.assert_allclose(findings.columns['sick'], expected)
    np.testing.assert_allclose(findings.columns['classifier_covid19'], softmax(found.classifier)[:, 2])


@pytest.mark.parametrize('experiment', [scans, slices])
def test_a_wrong_lesion_model_is_refused_first(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.common, 'train', lambda *_: pytest.fail('the slices are prepared'))
    config = {scans: seq, slices: att2}[experiment].get_config().unlock()
    config.lesions = str(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'config\.lesions=.*nowhere is not the workdir of a run'):
        experiment.train(config.lock(), tmp_path / 'run')
    slice_run = tmp_path / 'att2'
    slice_run.mkdir()
    save_config(slice_run, att2.get_config())
    config.unlock().lesions = str(slice_run)
    with pytest.raises(UserError, match=r'att2 is a run of att2, not of configs/lesions\.py'):
        experiment.train(config.lock(), tmp_path / 'run')


def test_data_without_normals_are_refused_before_the_slice_model_is_trained(
    data, config, outlined, tmp_path, monkeypatch
):
    monkeypatch.setattr(scans.slices, 'train', lambda *_: pytest.fail('the slice model is trained'))
    sick_alone = {split: [row for row in rows if row.label] for split, rows in data.rows.items()}
    monkeypatch.setattr(scans.common, 'load_data', lambda *_: data._replace(rows=sick_alone))
    monkeypatch.setattr(scans, 'load_configured', lambda name: None)
    config.unlock().lesions = 'box'
    with pytest.raises(UserError, match='needs sick and normal training scans'):
        scans.train(config.lock(), tmp_path / 'run')
