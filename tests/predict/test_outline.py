import json

import jax.numpy as jnp
import nibabel
import numpy as np
import pytest

from covidjax.data.phantom import render_volume
from covidjax.data.scan.volume import read_volume
from covidjax.experiment.runs import create_lesion_run
from covidjax.models.lesion_weights import LesionModel
from covidjax.models.lesions import LesionNet
from covidjax.predict.outline import choose_slices, outline_scan
from covidjax.predict.prepare import prepare_scan
from covidjax.predict.scan import create_recipe, format_line, predict_one
from covidjax.predict.tables import create_row
from tests.variables import draw_variables


@pytest.fixture(scope='module')
def scan(tmp_path_factory):
    """Whole lungs with COVID-19 in NIfTI, 2.5 mm pixels and 6 mm slices."""
    hu_TxHxW = render_volume(24, 128, 2, seed=1)
    path = tmp_path_factory.mktemp('scan') / 'scan.nii.gz'
    # Slices run from head to feet, rows to the back, columns to the patient's left.
    affine = np.array([[-2.5, 0, 0, 0], [0, -2.5, 0, 0], [0, 0, -6.0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(hu_TxHxW.transpose(2, 1, 0), affine @ np.diag([-1, 1, 1, 1])), path)
    return path


@pytest.fixture(scope='module')
def run():
    model = LesionNet(mirror=False)
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False)
    return create_lesion_run(LesionModel('a model', model, variables, 64, 0.5, 'phantoms', 'd' * 64, 'some slices'))


def test_prediction_of_a_lesion_model_alone(scan, run, tmp_path):
    line = predict_one(run, scan, tmp_path, series=None, force=True, masks=True)
    summary = json.loads((tmp_path / 'prediction.json').read_text())
    lesions = summary['lesions']
    assert 'verdict' not in summary
    assert lesions['digest'] == 'd' * 64
    assert len(lesions['slices']) == 24
    assert lesions['lungs_ml'] == pytest.approx(sum(side['lungs_ml'] for side in lesions['sides'].values()))
    assert lesions['lesions_ml'] <= lesions['lungs_ml']
    assert 'no verdict on COVID-19' in line
    page = (tmp_path / 'prediction.html').read_text()
    assert 'no verdict on COVID-19' in page
    assert 'look like lesions to this model' in page
    masks = nibabel.load(tmp_path / 'masks.nii.gz')
    source = nibabel.load(scan)
    np.testing.assert_allclose(masks.affine, source.affine, atol=1e-4)
    assert masks.shape == source.shape
    assert list((tmp_path / 'overlays').glob('slice_*.png'))
    row = create_row('scan', '', summary)
    assert row['lungs_ml'] == lesions['lungs_ml']
    assert row['verdict'] is None
    assert format_line(summary, tmp_path) == line


def test_lungs_are_those_of_the_scan_where_there_are_hounsfield_units(scan, run):
    prepared = prepare_scan(read_volume(scan, with_lungs=True), create_recipe(run), force=True)
    assert prepared.whole.shape == (24, 64, 64)
    outlined = outline_scan(run.lesions, prepared)
    found = prepared.volume.lungs.lungs_txhxw
    assert found.any()
    assert (outlined.burden.lungs_txGxV | found == outlined.burden.lungs_txGxV).all()
    assert outlined.probabilities.shape == (24, 16, 16, 3)
    assert [s.number for s in outlined.shown] == [place + 1 for place in choose_slices(outlined.burden)]


def test_slices_without_hounsfield_units_take_the_lungs_of_the_model(scan, run):
    volume = read_volume(scan)._replace(lungs=None)
    outlined = outline_scan(run.lesions, prepare_scan(volume, create_recipe(run), force=True))
    assert outlined.summary['lungs_ml'] is None
    assert 'by the model alone' in outlined.summary['lungs_found']
