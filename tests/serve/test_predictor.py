import csv
import gzip
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from covidjax.configs import att2
from covidjax.data.preprocess import apply_window
from covidjax.data.scan import nifti
from covidjax.data.scan.volume import read_volume
from covidjax.errors import TooLargeError, UserError
from covidjax.experiment.runs import Member
from covidjax.explain import catalogue
from covidjax.explain.maps import Explanations
from covidjax.predict import scan
from covidjax.serve import predictor, words
from covidjax.serve.pictures import compute_leading_maps
from covidjax.serve.worker import Job
from tests.predict.test_scan import EXTRACTOR, RESULTS, RULES
from tests.scan_files import IDENTITY, make_chest, write_images, write_series
from tests.variables import draw_variables

HU = make_chest()


@pytest.fixture(scope='module')
def run():
    config = att2.get_config()
    config.data.image_size = 32
    variables = draw_variables(EXTRACTOR, np.zeros((1, 32, 32, 1), np.float32), train=False)
    rules = RULES | {'scans': {'rule': 'top-3', **RULES}}
    return scan.Run(config, RESULTS, rules, (Member(EXTRACTOR, variables, None, None),))


def predict(run, tmp_path, **options):
    (tmp_path / 'results').mkdir()
    stages = []
    job = Job(tmp_path / 'source', tmp_path / 'results', None, force=False)._replace(**options)
    predictor.predict_job(run, job, stages.append)
    assert stages == ['reading', 'predicting', 'drawing']
    return job.results


def test_the_prediction_is_that_of_the_command_and_names_no_patient(run, tmp_path):
    results = predict(run, tmp_path, source=write_series(tmp_path / 'source', HU))
    scan.predict_one(run, tmp_path / 'source', tmp_path / 'out', series=None, force=False)
    mine, other = (json.loads((folder / 'prediction.json').read_text()) for folder in (results, tmp_path / 'out'))
    for summary in (mine, other):
        del summary['seconds'], summary['input']['name']
    assert mine == other
    view = json.loads((results / 'view.json').read_text())
    assert view['layers'] == {
        'map': 'evidence, predicted class',
        'has_lungs': True,
        'has_lesions': False,
        'is_windowed': True,
    }
    assert view['warnings'][0] == 'The model was trained on not patients.'
    everything = b' '.join(file.read_bytes() for file in results.rglob('*') if file.is_file()).lower()
    assert not any(word.lower().encode() in everything for word in (*IDENTITY.values(), 'secret'))
    assert f'scan {mine["input"]["sha256"][:8]}' in (results / 'prediction.html').read_text()
    with (results / 'slices.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row['probabilities_covid19']) for row in rows] == [s['probabilities'][2] for s in mine['slices']]
    assert [int(row['box_3']) for row in rows] == [s['box'][3] for s in mine['slices']]


def test_the_pictures_are_the_slices_from_head_to_feet(run, tmp_path):
    results = predict(run, tmp_path, source=write_series(tmp_path / 'source', HU, PixelSpacing=[5, 5]))
    grey = apply_window(HU)
    for number in (1, 9, 20):
        np.testing.assert_array_equal(np.asarray(Image.open(results / f'slices/{number}.png')), grey[number - 1])
        lungs = np.asarray(Image.open(results / f'lungs/{number}.png'))
        assert set(np.unique(lungs)) == {0, 255}
        assert (HU[number - 1][lungs > 0] < -300).mean() > 0.95
    assert len(list((results / 'maps').iterdir())) == 20


def test_leading_maps_are_those_of_the_catalogue(run, tmp_path):
    source = write_series(tmp_path / 'source', HU)
    prediction = scan.predict_scan(run, read_volume(source), {}, force=False, path=source)
    explained = prediction.explained
    maps = catalogue.compute_maps(Explanations(*explained), 32, prediction.combination)
    maps |= catalogue.restrict(maps, catalogue.find_lungs(prediction.images[..., None]))
    for name in ('attention 1', 'evidence, predicted class', 'evidence 1, sick less normal' + catalogue.IN_LUNGS):
        found = compute_leading_maps(prediction, name)
        np.testing.assert_allclose(found, maps[name] * 255, atol=0.6)


def test_a_run_without_a_leading_map_shows_none(run, tmp_path):
    refuted = run._replace(results=RESULTS | {'explanations': {'leading_map': {'name': None}}})
    results = predict(refuted, tmp_path, source=write_images(tmp_path / 'source', apply_window(HU)))
    assert json.loads((results / 'view.json').read_text())['layers'] == {
        'map': None,
        'has_lungs': False,
        'has_lesions': False,
        'is_windowed': False,
    }
    assert not (results / 'maps').exists()


def test_refusals_pass_and_a_single_file_is_read_as_such(run, tmp_path):
    (tmp_path / 'source').mkdir()
    (tmp_path / 'source' / '00001.zip').write_bytes(b'PK\3\4 and no more')
    with pytest.raises(UserError, match='damaged or truncated zip'):
        predict(run, tmp_path)


def test_dicom_results_of_predicted_and_of_refused_scans(run, tmp_path):
    pytest.importorskip('highdicom', reason='DICOM results need covidjax[dicom]')
    write_series(tmp_path / 'source', HU, FrameOfReferenceUID='1.2.3.5')
    results = predict(run, tmp_path, dicom=True)
    assert list_zip(results) == ['map.dcm', 'page.dcm', 'report.dcm']
    solid = np.where(HU < -950, HU, np.int16(40))
    job = Job(write_series(tmp_path / 'solid', solid), tmp_path / 'refused', None, force=False, dicom=True)
    job.results.mkdir()
    with pytest.raises(UserError, match='size of lungs'):
        predictor.predict_job(run, job, lambda stage: None)
    assert list_zip(job.results) == ['report.dcm']
    assert [path.name for path in job.results.iterdir()] == ['dicom.zip']


def list_zip(folder):
    with zipfile.ZipFile(folder / 'dicom.zip') as archive:
        return sorted(archive.namelist())


def test_words(run, tmp_path):
    source = write_series(tmp_path / 'source', HU)
    summary = scan.predict_scan(run, read_volume(source), {}, force=False, path=source).summary
    summary |= {'novelty': {'median': 1.5, 'share_unusual': 0.8}, 'left_out': {'copies': 2}, 'forced': ['no lungs']}
    summary['sick'] = {
        'probability': 0.9,
        'classifier_alone': {'normal': 0.2, 'covid19': 0.8},
        'disagreement': 'the two disagree',
    }
    answer = {'score': 0.5, 'threshold': 0.4, 'is_finding': True}
    summary['screening'] = {'covid19': answer, 'disease': answer | {'threshold': 0.6, 'is_finding': False}}
    found = words.describe_prediction(summary)
    assert found['headline'].startswith('Uncertain: the scan is unlike the training data.')
    assert 'Forced in spite of: no lungs.' in found['warnings']
    assert 'Do not trust the numbers: this scan is unlike the training data.' in found['warnings']
    text = ' '.join(found['reasons'])
    for part in (
        'holds normal, pneumonia, covid19',
        '1.50 of the threshold, and 80% of the slices',
        'Left out: 2 copies.',
        'probability of sick 0.90. The classifier decides which disease; alone it gives normal 0.20, covid19 0.80.',
        'The two disagree.',
        'Each screening has a threshold of its own, so they can differ.',
    ):
        assert part in text


def test_words_of_a_lesion_model_alone():
    lesions = {'lesions_percent': 2.34, 'lungs_ml': 3650.0, 'lesions_ml': 84.0, 'num_infected': 45, 'grade': 1}
    lesions |= {'grade_says': 'up to 25 %', 'remarks': ['few slices']}
    found = words.describe_prediction(
        {
            'lesions': lesions,
            'forced': [],
            'notice': None,
            'warnings': ['no verdict'],
            'left_out': {},
            'reading': {'notes': []},
        }
    )
    assert found == {
        'verdict': None,
        'headline': 'Lesions in 2.3 % of the lungs (84 of 3,650 ml), 45 infected slices, grade 1 (up to 25 %).',
        'warnings': ['No verdict.'],
        'reasons': ['Few slices.'],
    }


def test_gzip_bombs_are_too_large(run, tmp_path):
    (tmp_path / 'source').mkdir()
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode='w') as file:
        file.write(bytes(20_000))
    (tmp_path / 'source' / '00001.nii.gz').write_bytes(buffer.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nifti, 'MAX_BYTES', 10_000)
        with pytest.raises(TooLargeError, match='unpacks to more than'):
            predict(run, tmp_path)
