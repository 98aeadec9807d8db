import hashlib
import json
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from covidjax.configs import att2, seq
from covidjax.errors import UserError
from covidjax.evaluation.outputs import compute_outputs
from covidjax.evaluation.predictions import softmax
from covidjax.experiment import runs, scans, slices
from covidjax.experiment.config import save_config
from covidjax.experiment.export import export_run, write_stablehlo
from covidjax.experiment.runs import Member, Run
from covidjax.explain.evidence import combine_evidence
from covidjax.files import write_json
from covidjax.models.att2 import normalise
from covidjax.models.pretrained import load_pretrained
from covidjax.models.torch_names import from_torch
from tests.variables import draw_variables

RESULTS = {
    'model': 'ResNet50-ATT2 (slices)',
    'data': 'phantoms',
    'notice': 'not patients',
    'dataset': {'fingerprint': 'abc'},
}


@pytest.fixture
def make_run(monkeypatch):
    """Returns a function that creates the folder of a finished run and returns the variables of its fake checkpoint."""

    def make(workdir, name):
        variables = _make_run(workdir, name)
        monkeypatch.setattr({'att2': slices, 'seq': scans}[name], 'restore_best', lambda *_: variables)
        return variables

    return make


def _make_run(workdir, name):
    experiment, config = {'att2': (slices, att2), 'seq': (scans, seq)}[name]
    config = config.get_config()
    workdir.mkdir()
    save_config(workdir, config)
    write_json(workdir / 'results.json', RESULTS)
    write_json(workdir / 'calibration.json', {'temperature': 1.5})
    template = experiment.restore_best(config, types.SimpleNamespace(restore_best=lambda template: template))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), template)


@pytest.mark.parametrize('name', ['att2', 'seq'])
def test_there_and_back_is_exact(tmp_path, name, capsys, make_run):
    variables = make_run(tmp_path / 'run', name)
    path = tmp_path / 'model.safetensors'
    export_run(tmp_path / 'run', path)
    contract = json.loads((tmp_path / 'model.preprocessing.json').read_text())
    assert contract['exported'] == {
        'file': 'model.safetensors',
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        'scales': False,
    }
    assert contract['hashes']['prepared_data'] == 'abc'
    back = from_torch(safetensors.numpy.load_file(path), variables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    for before, after in zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True):
        assert np.asarray(before).tobytes() == after.tobytes()
        assert before.dtype == after.dtype
    assert str(path) in capsys.readouterr().out


def test_metadata(tmp_path, make_run):
    make_run(tmp_path / 'run', 'att2')
    path = tmp_path / 'model.safetensors'
    export_run(tmp_path / 'run', path)
    with safetensors.safe_open(path, 'numpy') as file:
        metadata = file.metadata()
    assert json.loads(metadata['classes']) == ['normal', 'pneumonia', 'covid19']
    assert json.loads(metadata['config'])['model']['width'] == 8
    assert metadata['notice'] == 'not patients'
    assert metadata['temperature'] == '1.5'
    # The normalisation equals the model's.
    scale = json.loads(metadata['normalisation'])
    grey = np.arange(256.0)
    expected = slices.normalise(jnp.asarray(grey))
    np.testing.assert_allclose((grey - scale['mean']) / scale['std'], expected, atol=1e-6)


def shrink(config, model):
    config.data.image_size = 32
    model.stage_sizes, model.width = (1, 1), 4


def load_program(path):
    return jax.export.deserialize(bytearray(path.read_bytes()))


def test_program_of_a_slice_model_takes_any_number_of_slices(tmp_path):
    config = att2.get_config()
    shrink(config, config.model)
    model = slices.create_model(config.model)
    variables = draw_variables(model, np.zeros((1, 32, 32, 1), np.float32), train=False, full=True)
    run = Run(config, RESULTS, {'temperature': 2.0}, (Member(model, variables, None, None),))
    write_stablehlo(tmp_path / 'a.stablehlo', run)
    program = load_program(tmp_path / 'a.stablehlo')
    assert program.fun_name == 'ResNet50_ATT2_normal_pneumonia_covid19_trained_on_phantoms'
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    for count in (1, 5):
        images = np.random.default_rng(count).integers(0, 256, (count, 32, 32), dtype=np.uint8)
        outputs = program.call(images)
        whole = compute_outputs(model, variables, images[..., None])
        expected = whole.logits
        np.testing.assert_allclose(outputs['logits'], expected, atol=1e-6)
        np.testing.assert_allclose(outputs['probabilities'], softmax(expected / 2), atol=1e-6)
        evidence = outputs['evidence']
        assert evidence.shape == (count, 32, 32, 3)
        np.testing.assert_allclose(evidence, combine_evidence(whole.evidence, 32, 'concat'), atol=1e-6)
        sums = np.asarray(evidence).sum((1, 2)) + variables['params']['classifier']['bias']
        np.testing.assert_allclose(sums, expected, atol=1e-5)


def test_program_of_a_scan_model_ignores_what_the_mask_leaves_out(tmp_path):
    config = seq.get_config()
    shrink(config, config.att2.model)
    config.data.min_slices, config.model.hidden = 1, 8
    model = scans.create_model(config)
    variables = draw_variables(model, np.zeros((1, 32, 32, 1), np.float32), np.ones(1, np.int32))
    of_slices, sequence = scans.get_extractor(variables), variables['params']['sequence']
    run = Run(config, RESULTS, {'temperature': 2.0}, (Member(model.extractor, of_slices, sequence, None),))
    write_stablehlo(tmp_path / 's.stablehlo', run)
    images = np.random.default_rng(0).integers(0, 256, (2, 19, 32, 32), dtype=np.uint8)
    mask = np.ones((2, 19), bool)
    mask[1, [0, 5, 18]] = False
    program = load_program(tmp_path / 's.stablehlo')
    assert [str(n) for n in program.in_avals[0].shape] == ['b', 't', '32', '32']
    outputs = program.call(images, mask)
    lengths = mask.sum(1, dtype=np.int32)
    order = np.argsort(~mask, axis=1, kind='stable')  # padding last
    padded = np.moveaxis(np.take_along_axis(images, order[..., None, None], 1), 1, -1)
    expected = jax.device_get(jax.jit(model.apply)(variables, normalise(padded), lengths))
    np.testing.assert_allclose(outputs['logits'], expected.logits, atol=1e-6)
    np.testing.assert_allclose(outputs['probabilities'], softmax(expected.logits / 2), atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(outputs['attention'], order, 1), expected.attention, atol=1e-6)
    ordered = np.take_along_axis(outputs['evidence'], order[..., None], 1)
    np.testing.assert_allclose(ordered, expected.evidence, atol=1e-6)
    config.data.min_slices = 16
    write_stablehlo(tmp_path / 's.stablehlo', run)
    assert [str(n) for n in load_program(tmp_path / 's.stablehlo').in_avals[1].shape] == ['b', '16']


def test_another_run_can_start_from_its_backbone(tmp_path, make_run):
    variables = make_run(tmp_path / 'run', 'att2')
    export_run(tmp_path / 'run', tmp_path / 'model.safetensors')
    other = jax.tree.map(jnp.zeros_like, variables)
    loaded = load_pretrained(other, tmp_path / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, loaded['params']['backbone'], variables['params']['backbone'])
    jax.tree.map(np.testing.assert_array_equal, loaded['params']['classifier'], other['params']['classifier'])


def fail(*_):
    raise AssertionError('the checkpoint was read')


@pytest.mark.parametrize('name', ['model.onnx', 'model', 'model.safetensors.gz'])
def test_other_kinds_of_files(tmp_path, name, make_run, monkeypatch):
    make_run(tmp_path / 'run', 'att2')
    monkeypatch.setattr(slices, 'restore_best', fail)
    with pytest.raises(UserError, match=r'must end in \.safetensors or \.stablehlo'):
        export_run(tmp_path / 'run', tmp_path / name)


def test_missing_and_unfinished_runs(tmp_path, make_run, monkeypatch):
    with pytest.raises(UserError, match='not the workdir of a run'):
        export_run(tmp_path / 'none', tmp_path / 'model.safetensors')
    make_run(tmp_path / 'run', 'att2')
    monkeypatch.setattr(slices, 'restore_best', fail)
    for name in ('calibration.json', 'results.json'):
        (tmp_path / 'run' / name).write_text('{')
        with pytest.raises(UserError, match=f'{name} is unreadable'):
            export_run(tmp_path / 'run', tmp_path / 'model.safetensors')
        (tmp_path / 'run' / name).unlink()
        with pytest.raises(UserError, match=f'has no {name}'):
            export_run(tmp_path / 'run', tmp_path / 'model.safetensors')


def test_output_that_cannot_be_written(tmp_path, make_run):
    make_run(tmp_path / 'run', 'att2')
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.safetensors').mkdir()
    for output in ('none/model.safetensors', 'file/model.safetensors', 'folder.safetensors'):
        with pytest.raises(UserError, match='cannot write --output'):
            export_run(tmp_path / 'run', tmp_path / output)
    assert {path.name for path in tmp_path.iterdir()} == {'run', 'file', 'folder.safetensors'}


def test_failure_keeps_the_old_file(tmp_path, monkeypatch, make_run):
    make_run(tmp_path / 'run', 'att2')
    path = tmp_path / 'model.safetensors'
    path.write_text('old')

    def fill_disk(tensors, filename, metadata):
        filename.write_text('half')
        raise safetensors.SafetensorError('No space left on device')

    monkeypatch.setattr(safetensors.numpy, 'save_file', fill_disk)
    with pytest.raises(UserError, match='No space left'):
        export_run(tmp_path / 'run', path)
    assert path.read_text() == 'old'
    assert {path.name for path in tmp_path.iterdir()} == {'run', 'model.safetensors'}


def test_a_run_on_lesions_exports_its_classifier_and_says_so(make_run, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / 'run', 'seq')
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    write_json(tmp_path / 'run' / 'config.json', {**config, 'lesions': 'box'})
    rules = {'temperature': 1.5, 'sick': {'digest': 'd', 'classifier_temperature': 2.0}}
    write_json(tmp_path / 'run' / 'calibration.json', rules)
    monkeypatch.setattr(runs, 'load_lesions', lambda name: types.SimpleNamespace(name=name, digest='d'))
    output = tmp_path / 'model.safetensors'
    export_run(tmp_path / 'run', output)
    with safetensors.safe_open(output, 'numpy') as file:
        metadata = file.metadata()
    assert json.loads(metadata['temperature']) == 2.0
    [warning] = json.loads(metadata['warnings'])
    assert 'the classifier alone' in warning
    assert warning in capsys.readouterr().out
    run = runs.load_run(tmp_path / 'run')
    assert run.temperature == 1.5
