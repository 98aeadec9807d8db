import jax
import nibabel
import numpy as np
import pytest

from covidjax.configs import att2, seq
from covidjax.data.preprocess import apply_window
from covidjax.data.scan.volume import read_volume
from covidjax.experiment import slices
from covidjax.experiment.runs import Member, compute_member_outputs
from covidjax.predict import scan
from covidjax.predict.prepare import prepare_scan, prepare_slice, stack_images
from covidjax.predict.tables import create_row
from covidjax.predict.windows import compare_windows
from covidjax.report.prediction import build_headline
from covidjax.serve.words import describe_prediction
from tests.predict.test_scan import EXTRACTOR, RESULTS, RULES, draw_sequence_model
from tests.scan_files import make_chest, write_images, write_series
from tests.variables import draw_variables

HU = make_chest(20)
WINDOWS = ((-1000, 400), (-1200, 600))


@pytest.fixture(scope='module')
def run():
    config = att2.get_config()
    model = slices.create_model(config.model)
    variables = draw_variables(model, np.zeros((1, 64, 64, 1), np.float32), train=False, full=True)
    sure = RULES | {
        'conformal': RULES['conformal'] | {'thresholds': dict.fromkeys(('normal', 'pneumonia', 'covid19'), 1e9)}
    }
    rules = RULES | {'scans': {'rule': 'mean', **sure}}
    return scan.Run(config, RESULTS, rules, (Member(model, variables, None, None),))


@pytest.fixture(scope='module')
def series(tmp_path_factory):
    return write_series(tmp_path_factory.mktemp('windows') / 'scan', HU, PixelSpacing=[5, 5])


def test_windows():
    hu = np.array([-3000, -1000, -300, 400, 3000])
    assert apply_window(hu, (-1000, 400)).tolist() == [0, 0, 128, 255, 255]
    assert apply_window(hu).tolist() == apply_window(hu, (-1350, 150)).tolist() == [0, 60, 178, 255, 255]


def test_what_is_compared():
    shares = np.array([[0.1, 0.2, 0.7], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]])
    found = compare_windows(((-1350, 150), *WINDOWS), shares, 2, 9)
    assert found['spread'] == pytest.approx({'normal': 0.2, 'pneumonia': 0.5, 'covid19': 0.4})
    assert found['largest_spread'] == pytest.approx(0.5)
    assert [one['class'] for one in found['by_window']] == ['covid19', 'pneumonia', 'covid19']
    assert found['is_changed']
    assert not compare_windows(WINDOWS, shares[[0, 2]], 2, 9)['is_changed']
    assert compare_windows(WINDOWS, shares[[0, 2]], 0, 9)['is_changed']  # another class than all slices give


def test_hounsfield_units_are_kept_of_every_second_slice(series, tmp_path):
    kept = read_volume(series, hu_step=2).planes_hu
    assert list(kept) == list(range(0, 20, 2))
    for place, plane in kept.items():
        np.testing.assert_array_equal(plane, HU[place])
        assert plane.base is None  # no view that keeps the whole scan in memory
    nifti = tmp_path / 'scan.nii.gz'
    affine = np.diag([5.0, 5, 5, 1]) @ np.diag([1, -1, -1, 1])
    nibabel.save(nibabel.Nifti1Image(HU.transpose(2, 1, 0)[::-1], affine), nifti)
    volume = read_volume(nifti, hu_step=3)
    assert volume.lungs is None
    assert list(volume.planes_hu) == [0, 3, 6, 9, 12, 15, 18]
    for place, plane in volume.planes_hu.items():
        np.testing.assert_array_equal(apply_window(plane), volume.slices[place])
    assert read_volume(series).planes_hu is None
    assert read_volume(write_images(tmp_path / 'images', apply_window(HU)), hu_step=2).planes_hu is None


@pytest.mark.parametrize('region', ['body', 'lungs'])
def test_slices_are_prepared_alike_under_every_window(run, series, region):
    config = run.config.copy_and_resolve_references().unlock()
    config.data.region = region
    recipe = scan.create_recipe(run._replace(config=config.lock()), 3)
    assert recipe.hu_step == 2
    volume = read_volume(series, with_lungs=True, hu_step=2)
    prepared = prepare_scan(volume, recipe, force=True)
    views = prepared.views
    assert views.windows_hu == WINDOWS
    assert prepared.used[views.positions].tolist() == [p for p in prepared.used.tolist() if p % 2 == 0]
    assert prepared.num_images == len(stack_images(prepared)) == len(prepared.images) + 2 * len(views.positions)
    assert prepared.volume.planes_hu is None
    # Through the window of the run they would be its own images.
    for k, window in enumerate(WINDOWS):
        again = volume._replace(slices=[apply_window(hu, window) for hu in HU], planes_hu=None)
        if region == 'lungs':
            expected = prepare_scan(again, recipe, force=True)
            np.testing.assert_array_equal(views.images[k], expected.images[views.positions])
        else:
            place = int(prepared.used[views.positions[3]])
            np.testing.assert_array_equal(
                views.images[k, 3], prepare_slice(again.slices[place], prepared.boxes[place], recipe.image_size)
            )


def test_the_call_under_every_window(run, series, tmp_path):
    volume = read_volume(series, hu_step=2)
    prediction = scan.predict_scan(run, volume, {}, force=True, path=series)
    found = prediction.summary['windows']
    prepared = prepare_scan(volume, scan.create_recipe(run, 3), force=True)
    views = [prepared.images[prepared.views.positions], *prepared.views.images]
    for images, one in zip(views, found['by_window'], strict=True):
        logits, _ = scan.vote(run, compute_member_outputs(run, images[..., np.newaxis]))
        shares = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(list(one['probabilities'].values()), shares, atol=1e-5)
    assert found['num_slices'] == 10
    assert len(prediction.summary['slices']) == len(prediction.images) == len(prediction.explained.probabilities) == 20
    alone = scan.predict_scan(run, read_volume(series), {}, force=True, path=series).summary
    assert alone['windows'] is None
    assert alone['class'] == prediction.summary['class']
    for name in ('probabilities', 'slices'):
        assert jax.tree.all(
            jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), alone[name], prediction.summary[name])
        )
    assert create_row('scan', '', prediction.summary | {'seconds': {}})['window_spread'] == found['largest_spread']


def test_a_call_that_changes_is_uncertain(run, series, tmp_path):
    summary = scan.predict_scan(run, read_volume(series, hu_step=2), {}, force=True, path=series).summary
    summary['conformal']['set'], summary['novelty'] = [summary['class']], None
    for is_changed in (False, True):
        summary['windows']['is_changed'] = is_changed
        verdict = scan._find_verdict(summary)
        assert verdict == ('uncertain' if is_changed else summary['class'])
        assert ('depends on the grey window' in build_headline(summary)) == is_changed
        [reason] = [text for text in describe_prediction(summary)['reasons'] if '-1200 to 600 HU' in text]
        assert ('depends on' in reason) == is_changed
        line = scan.format_verdict(summary | {'verdict': verdict})
        assert ('the window changes the call, spread' if is_changed else '3 windows agree, spread') in line
    folder = tmp_path / 'out'
    scan.predict_one(run, series, folder, series=None, force=True)
    assert 'Grey windows, 10 slices under each' in (folder / 'prediction.html').read_text()
    scan.predict_one(run, series, folder, series=None, force=True, windows=1)
    assert 'Grey windows' not in (folder / 'prediction.html').read_text()


@pytest.mark.parametrize(('min_slices', 'hu_step', 'seen'), [(16, 1, 16), (4, 2, 10)])
def test_a_scan_run_looks_at_the_slices_that_it_selects(series, min_slices, hu_step, seen):
    _, variables = draw_sequence_model()
    config = seq.get_config()
    config.data.image_size, config.data.min_slices, config.model.hidden = 32, min_slices, 8
    of_extractor = {kind: variables[kind]['extractor'] for kind in ('params', 'batch_stats')}
    run = scan.Run(config, RESULTS, RULES, (Member(EXTRACTOR, of_extractor, variables['params']['sequence'], None),))
    recipe = scan.create_recipe(run, 3)
    assert recipe.hu_step == hu_step
    assert scan.create_recipe(run).hu_step == 0
    summary = scan.predict_scan(run, read_volume(series, hu_step=hu_step), {}, force=True, path=series).summary
    assert summary['windows']['num_slices'] == seen
    if seen == 16:  # the same slices
        first = summary['windows']['by_window'][0]['probabilities']
        assert first == pytest.approx(summary['probabilities'], abs=1e-5)
