import base64
import dataclasses
import json
import os
import re
import types

import jax
import numpy as np
import pytest
import scipy
from PIL import Image

from covidjax.configs import att2, seq
from covidjax.data import preprocess
from covidjax.data.preprocess import apply_window
from covidjax.data.scan import body
from covidjax.data.scan.body import find_body_box, find_doubts
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from covidjax.evaluation.home import fit_home
from covidjax.evaluation.novelty import fit_novelty
from covidjax.evaluation.outputs import compute_outputs
from covidjax.experiment import common, slices
from covidjax.experiment.runs import Member
from covidjax.models.att2 import Att2, normalise
from covidjax.models.seq import Seq, SequenceClassifier
from covidjax.predict import scan
from covidjax.predict.prepare import prepare_slice
from covidjax.predict.tables import create_row
from covidjax.serve.words import describe_prediction
from tests.scan_files import IDENTITY, make_chest, write_images, write_series
from tests.variables import draw_variables

HU = make_chest()
GREY = apply_window(HU)
RESULTS = {
    'model': 'ResNet50-ATT2 (slices)',
    'data': 'phantoms',
    'notice': 'not patients',
    'accuracy': 0.5,
    'intervals': {'accuracy': [0.4, 0.6]},
}
RULES = {
    'temperature': 1.0,
    'conformal': {
        'coverage': 0.9,
        'thresholds': {'normal': 1.0, 'pneumonia': 1.0, 'covid19': 1.0},
        'notes': ['too few'],
    },
    'thresholds': {target: {'threshold': 0.5} for target in ('covid19', 'disease')},
}


@pytest.fixture(scope='module')
def run():
    config = att2.get_config()
    model = slices.create_model(config.model)
    variables = draw_variables(model, np.zeros((1, 64, 64, 1), np.float32), train=False, full=True)
    return scan.Run(
        config, RESULTS, RULES | {'scans': {'rule': 'top-3', **RULES}}, (Member(model, variables, None, None),)
    )


def test_a_slice_is_prepared_as_for_training(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (90, 70), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / 'a.png')
    for box in ((3, 5, 60, 80), (-4, 0, 70, 95)):
        [(png, _)] = preprocess.encode_slices([(str(tmp_path / 'a.png'), box)], 64, os.getpid())
        np.testing.assert_array_equal(prepare_slice(grey, box, 64), preprocess.decode_png(png)[..., 0])


def test_the_box_is_that_of_the_body():
    for hu, grey in zip(HU, GREY, strict=True):
        rows, columns = np.nonzero(hu > -950)
        expected = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.subtract(find_body_box(grey), expected)).max() <= 2
    assert find_body_box(np.zeros((40, 50), np.uint8)) == (0, 0, 50, 40)


def test_blurring_is_that_of_scipy():
    for grey in GREY[:3]:
        np.testing.assert_array_equal(body._blur(grey[:50]), scipy.ndimage.gaussian_filter(np.float32(grey[:50]), 1))


def test_opening_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for reach in (1, 2, 3):
        mask = scipy.ndimage.gaussian_filter(rng.random((50, 40)), 2) > 0.5
        expected = scipy.ndimage.binary_opening(mask, iterations=reach)
        assert expected.any()
        np.testing.assert_array_equal(body._open(mask, reach), expected)


def test_doubts():
    def prepare(grey):
        return [prepare_slice(g, find_body_box(g), 64) for g in grey]

    assert find_doubts(prepare(GREY)) == []
    assert find_doubts(list(GREY[:, 20:45, 10:56])) == []  # cropped to the lungs, which touch its sides
    solid = np.where(HU < -950, GREY, 237).astype(np.uint8)
    assert 'air the size of lungs' in find_doubts(prepare(solid))[0]
    solid[:, 52:55] = 237  # a table: the air above it does not reach the corners
    assert 'in 0 of 20 slices' in find_doubts(prepare(solid))[0]
    assert 'in 0 of 20 slices' in find_doubts(prepare(np.maximum(GREY, 200)))[0]  # fat and muscle
    smooth = np.stack([np.outer(np.hanning(64), np.hanning(64)) * 255 for _ in range(3)])
    rows, columns = np.mgrid[:64, :64]
    smooth[:, np.hypot(rows - 32, columns - 32) < 10] = 90  # dark inside bright, and every grey around
    assert find_doubts(list(smooth.astype(np.uint8))) != []


def test_report_of_a_scan_names_no_patient(run, tmp_path, capfd, caplog):
    line = scan.predict_one(run, write_series(tmp_path / 'scan', HU), tmp_path / 'out', series=None, force=False)
    summary = json.loads((tmp_path / 'out' / 'prediction.json').read_text())
    page = (tmp_path / 'out' / 'prediction.html').read_text()
    assert summary['verdict'] == 'uncertain'  # the set holds all classes
    assert summary['vote'] == {'rule': 'top-3', 'is_chosen_on_validation': True}
    assert sum(summary['probabilities'].values()) == pytest.approx(1)
    assert [s['number'] for s in summary['slices']] == list(range(1, 21))
    assert len(summary['rests_on']) == 5
    shares = np.array([s['evidence'] for s in summary['slices']]) + summary['evidence']['bias']
    expected = np.exp(shares) / np.exp(shares).sum(1, keepdims=True)  # the temperature of the run is 1
    np.testing.assert_allclose([s['probabilities'] for s in summary['slices']], expected, atol=1e-5)
    assert 'The top slices with their evidence maps' in page
    assert 'scan: uncertain (normal ' in line
    for word in ('not patients', 'Not available', 'too few', summary['input']['sha256'], 'series 4: 20 slices'):
        assert word in page
    everything = ' '.join([line, page, json.dumps(summary), caplog.text, *capfd.readouterr()]).lower()
    assert not any(word.lower() in everything for word in (*IDENTITY.values(), 'secret'))


def test_maps_that_scored_no_better_than_chance_are_not_shown(run, tmp_path):
    refuted = run._replace(results=RESULTS | {'explanations': {'leading_map': {'name': None}}})
    scan.predict_one(refuted, write_series(tmp_path / 'scan', HU), tmp_path / 'out', series=None, force=False)
    page = (tmp_path / 'out' / 'prediction.html').read_text()
    assert 'No map of this run beat chance' in page
    assert 'evidence maps' not in page


def test_what_is_left_out_is_in_line_json_and_page(run, tmp_path):
    folder = write_series(tmp_path / 'scan', HU)
    (folder / 'copy').write_bytes(next(folder.iterdir()).read_bytes())
    (folder / 'readme.txt').write_text('hello')
    line = scan.predict_one(run, folder, tmp_path / 'out', series=None, force=False)
    summary = json.loads((tmp_path / 'out' / 'prediction.json').read_text())
    assert summary['left_out'] == {'not DICOM': 1, 'copies': 1}
    for text in (line, (tmp_path / 'out' / 'prediction.html').read_text()):
        assert '1 not DICOM, 1 copies' in text


def test_scans_of_one_name_get_folders_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, 'load_run', lambda workdir: run)
    inputs = [write_images(tmp_path / name / 'CT', GREY[start : start + 3]) for name, start in (('a', 3), ('b', 9))]
    inputs.append(write_images(tmp_path / 'c', GREY[3:6]))
    assert scan.predict_all(tmp_path, inputs, tmp_path / 'out', series=None, force=False)
    folders = sorted(folder.name for folder in (tmp_path / 'out').iterdir())
    expected = [f'CT-{read_volume(path).sha256[:8]}' for path in inputs[:2]]
    assert folders == sorted([*expected, 'c'])


def test_votes_are_means_of_slices_where_a_run_stores_no_rule(run, tmp_path):
    old = run._replace(rules=RULES)
    line = scan.predict_one(old, write_series(tmp_path / 'scan', HU), tmp_path / 'out', series=None, force=False)
    summary = json.loads((tmp_path / 'out' / 'prediction.json').read_text())
    assert summary['conformal'] is None
    assert 'no conformal set' in line
    expected = np.mean([s['probabilities'] for s in summary['slices']], axis=0)
    np.testing.assert_allclose(list(summary['probabilities'].values()), expected, atol=1e-9)


def test_doubts_stop_unless_forced_and_one_refusal_does_not_stop_the_others(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scan, 'load_run', lambda workdir: run)
    flat = write_images(tmp_path / 'flat', np.where(HU < -950, GREY, 237).astype(np.uint8)[:3])
    good = write_images(tmp_path / 'good', GREY[:3])
    assert not scan.predict_all(tmp_path, [flat, good], None, series=None, force=False)
    printed = capsys.readouterr()
    assert 'error: ' in printed.err
    assert '--force' in printed.err
    assert printed.out.startswith('good: ')
    assert not (tmp_path / 'predictions' / 'flat').exists()
    assert scan.predict_all(tmp_path, [flat], tmp_path / 'out', series=None, force=True)
    assert 'FORCED' in capsys.readouterr().out
    assert 'Forced in spite of' in (tmp_path / 'out' / 'prediction.html').read_text()


EXTRACTOR = Att2((1, 1), width=4, block='basic', stem='small', tail_blocks=1)


def draw_sequence_model():
    model = Seq(EXTRACTOR, hidden=8)
    return model, draw_variables(model, np.zeros((1, 32, 32, 20), np.float32), np.array([20], np.int32))


def test_sequence_on_embeddings_is_the_sequence_model():
    model, variables = draw_sequence_model()
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 20), dtype=np.uint8)
    lengths = np.array([20], np.int32)
    whole = jax.jit(model.apply)(variables, normalise(images), lengths)
    of_extractor = {kind: variables[kind]['extractor'] for kind in ('params', 'batch_stats')}
    outputs = compute_outputs(EXTRACTOR, of_extractor, np.moveaxis(images, -1, 0).reshape(20, 32, 32, 1))
    sequence = variables['params']['sequence']
    logits, attention, evidence = scan.apply_sequence(SequenceClassifier(8), sequence, outputs.embedding)
    np.testing.assert_allclose(logits, whole.logits[0], atol=1e-5)
    np.testing.assert_allclose(attention, whole.attention[0], atol=1e-5)
    np.testing.assert_allclose(evidence, whole.evidence[0], atol=1e-5)
    np.testing.assert_allclose(evidence.sum(0) + sequence['classifier']['bias'], logits, atol=1e-5)
    np.testing.assert_allclose(outputs.logits, whole.slice_logits[0], atol=1e-5)
    assert jax.tree.leaves(outputs)[0].shape == (20, 3)


@pytest.mark.parametrize('min_slices', [1, 16])
def test_a_sequence_model_sees_sixteen_slices_or_all(tmp_path, min_slices):
    _, variables = draw_sequence_model()
    config = seq.get_config()
    config.data.image_size, config.data.min_slices, config.model.hidden = 32, min_slices, 8
    of_extractor = {kind: variables[kind]['extractor'] for kind in ('params', 'batch_stats')}
    run = scan.Run(config, RESULTS, RULES, (Member(EXTRACTOR, of_extractor, variables['params']['sequence'], None),))
    scan.predict_one(run, write_series(tmp_path / 'scan', HU), tmp_path / 'out', series=None, force=False)
    slices = json.loads((tmp_path / 'out' / 'prediction.json').read_text())['slices']
    spread = np.linspace(1, 20, 16).round() if min_slices == 16 else np.arange(1, 21)
    assert [s['number'] for s in slices] == spread.tolist()
    assert sum(s['attention'] for s in slices) == pytest.approx(1, abs=1e-5)
    assert 'Attention to it' in decode_pictures(tmp_path / 'out' / 'prediction.html')
    short = write_series(tmp_path / 'short', HU[:15])
    if min_slices == 16:
        with pytest.raises(UserError, match='15 slices, and this model needs 16'):
            scan.predict_one(run, short, tmp_path / 'none', series=None, force=True)
        assert not (tmp_path / 'none').exists()


def decode_pictures(page):
    pictures = re.findall(r'data:image/svg\+xml;base64,([^"]+)', page.read_text())
    return ' '.join(base64.b64decode(picture).decode() for picture in pictures)


def test_an_evaluation_that_can_not_tell_what_is_usual_keeps_nothing_older(tmp_path):
    _, variables = draw_sequence_model()
    of_extractor = {kind: variables[kind]['extractor'] for kind in ('params', 'batch_stats')}
    rows = [types.SimpleNamespace(patient='one', source='A')] * 4
    records = [{'image': np.zeros((32, 32, 1), np.uint8)}] * 4
    for name in ('novelty.npz', 'sources.npz'):
        (tmp_path / name).write_bytes(b'old')
    data = types.SimpleNamespace(rows={'train': rows, 'val': rows}, sources={'train': records, 'val': records})
    common.save_usual(tmp_path, EXTRACTOR, of_extractor, data)
    assert list(tmp_path.iterdir()) == []


def test_unusual_scans_are_uncertain_whatever_the_probabilities(run, tmp_path):
    sure = json.loads(json.dumps(RULES))
    sure['conformal']['thresholds'] = dict.fromkeys(('normal', 'pneumonia', 'covid19'), 0.5)
    sure['temperature'] = 1e-3  # one class gets it all
    usual = np.random.default_rng(0).normal(size=(100, 240))
    novelty = fit_novelty(usual, [f'p{i % 10}' for i in range(100)])
    verdicts = []
    for found in (None, novelty):
        series = write_series(tmp_path / 'scan', HU[:3])
        changed = run._replace(
            members=(dataclasses.replace(run.members[0], novelty=found),),
            rules=RULES | {'scans': {'rule': 'mean', **sure}},
        )
        verdicts.append(scan.predict_one(changed, series, tmp_path / 'out', series=None, force=False, windows=1))
    assert 'scan: uncertain' not in verdicts[0]
    assert 'scan: uncertain' in verdicts[1]
    assert 'unlike the training data) [model trained on phantoms]' in verdicts[1]
    home = fit_home(usual, ['A'] * 50 + ['B'] * 50)
    of_sources = changed._replace(members=(dataclasses.replace(changed.members[0], home=home),))
    line = scan.predict_one(of_sources, series, tmp_path / 'out', series=None, force=False)
    summary = json.loads((tmp_path / 'out' / 'prediction.json').read_text())
    assert summary['home']['text'] == f'nearest to {summary["home"]["nearest"]}, far from all'
    assert f'unlike the training data; {summary["home"]["text"]})' in line
    assert summary['home']['text'] in (tmp_path / 'out' / 'prediction.html').read_text()
    assert create_row('scan', '', summary)['home'] == summary['home']['text']
    assert any(summary['home']['text'] in reason for reason in describe_prediction(summary)['reasons'])
    assert 'Uncertain: the scan is unlike' in (tmp_path / 'out' / 'prediction.html').read_text()


def test_a_model_of_lungs_sees_scans_cut_to_the_lungs(run, tmp_path):
    config = run.config.copy_and_resolve_references().unlock()
    config.data.region = 'lungs'
    of_lungs = run._replace(config=config.lock())
    hu = make_chest(20)
    hu[:3] = np.where(hu[:3] < -200, np.int16(40), hu[:3])  # above the lungs
    hu[:3, :4] = -1000  # air, so that these are still slices of a CT
    path = write_series(tmp_path / 'scan', hu, PixelSpacing=[5, 5])
    volume = read_volume(path, with_lungs=True)
    prediction = scan.predict_scan(of_lungs, volume, {}, force=True, path=path)
    assert prediction.used.tolist() == list(range(3, 20))
    for image in prediction.images:
        assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0  # black outside the lungs
        assert 20 < np.median(image[image > 10]) < 110  # lung, about -800 HU in the window, not body
    left, top, right, bottom = prediction.boxes[10]
    lungs = np.argwhere(hu[10] < -700)
    inside = lungs[(lungs[:, 1] > 8) & (lungs[:, 1] < 53) & (lungs[:, 0] > 16) & (lungs[:, 0] < 48)]
    assert np.abs(np.subtract((left, top), inside.min(0)[::-1])).max() <= 3
    assert np.abs(np.subtract((right, bottom), inside.max(0)[::-1] + 1)).max() <= 3
    [note] = prediction.summary['reading']['notes'][-1:]
    assert note == 'lungs found in 3-D, from Hounsfield units; 3 slices with few or none were left out'

    # The same slices as images: the model of lesions finds them.
    images = read_volume(write_images(tmp_path / 'images', apply_window(hu[3:])))
    from_greys = scan.predict_scan(of_lungs, images, {}, force=True, path=path)
    assert len(from_greys.used) == 17
    assert 'lungs found by the lesion model' in from_greys.summary['reading']['notes'][-1]
