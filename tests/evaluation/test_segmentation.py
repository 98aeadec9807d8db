import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from covidjax.data.masked_slices import CONSOLIDATION, LESION, LUNGS
from covidjax.data.preprocess import resize_probabilities
from covidjax.evaluation import segmentation
from covidjax.evaluation.segmentation import THRESHOLDS

ALL = LUNGS | LESION | CONSOLIDATION
GREY = np.zeros((4, 4), np.uint8)


def measure(lesion, masks, *, lungs=None, consolidation=0.0, known=ALL, grey=GREY, patient='a', **options):
    """Measures a slice of 4 x 4 pixels; by default the model's lungs are the outlined ones."""
    masks = np.asarray(masks, np.uint8)
    lungs = (masks > 0) if lungs is None else lungs
    planes = [np.broadcast_to(np.asarray(part, np.float32), (4, 4)) for part in (lungs, lesion, consolidation)]
    return segmentation.measure_slice(np.stack(planes, -1), masks, known, grey, patient=patient, **options)


# Two rows of lungs, of which the first has two lesion pixels, one of them consolidated.
MASKS = np.array([[7, 3, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
LESIONS = np.array([[0.9, 0.4, 0.5, 0.1], [0.1, 0.1, 0.1, 0.1], [0.6, 0, 0, 0], [0, 0, 0, 0]])


def test_scores_of_one_slice_by_hand():
    grey = np.array([[200, 50, 100, 50], [50, 50, 50, 50], [0, 0, 0, 0], [0, 0, 0, 0]], np.uint8)
    found = segmentation.score_slices([measure(LESIONS, MASKS, grey=grey, consolidation=0.5)], 0.4)
    # Called at .4: two lesion pixels, one of the lungs and one outside.
    assert found['dice'] == {'mean': pytest.approx(2 * 2 / (4 + 2)), 'low': None, 'high': None, 'n': 1}
    # The lesion pixels rank 1 and 4 of 16: 14 + 12 of 2 * 14 pairs.
    assert found['auc']['mean'] == pytest.approx(26 / 28)
    assert found['auc_in_lungs']['mean'] == pytest.approx((6 + 5) / 12)
    # 200 is above six greys; 50 ties with five and is below one.
    assert found['grey_auc_in_lungs']['mean'] == pytest.approx((6 + 2.5) / 12)
    assert found['pointing']['mean'] == 1
    assert found['lungs_dice']['mean'] == 1
    assert found['consolidation_dice']['mean'] == pytest.approx(2 * 1 / (4 + 1))
    # From .41 to .5 one hit of three called: 2 / 5; from .61 one of one called: 2 / 3.
    assert found['best'] == {'threshold': 0.11, 'dice': found['dice']}
    assert (found['num_slices'], found['num_lesion_slices'], found['num_patients']) == (1, 1, 1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_every_threshold_agrees_with_scikit_learn(dtype):
    rng = np.random.default_rng(0)
    probabilities = rng.choice([*THRESHOLDS, 0.0, 1.0], (32, 32, 3)).astype(dtype)
    masks = rng.choice([0, 1, 3, 7], (32, 32)).astype(np.uint8)
    grey = rng.integers(0, 256, (32, 32), np.uint8)
    measures = segmentation.measure_slice(probabilities, masks, ALL, grey, patient='a')
    is_lesion, is_lungs = (masks & LESION) > 0, masks > 0
    lungs, lesion, consolidation = np.moveaxis(probabilities, -1, 0)
    for threshold in THRESHOLDS:
        found = segmentation.score_slices([measures], threshold)
        called = lesion >= dtype(threshold)
        assert found['dice']['mean'] == pytest.approx(f1_score(is_lesion.ravel(), called.ravel()))
        dense = called & (consolidation >= 0.5)
        assert found['consolidation_dice']['mean'] == pytest.approx(f1_score((masks & 4).ravel() > 0, dense.ravel()))
    assert found['auc']['mean'] == pytest.approx(roc_auc_score(is_lesion.ravel(), lesion.ravel()))
    assert found['auc_in_lungs']['mean'] == pytest.approx(roc_auc_score(is_lesion[is_lungs], lesion[is_lungs]))
    assert found['grey_auc_in_lungs']['mean'] == pytest.approx(roc_auc_score(is_lesion[is_lungs], grey[is_lungs]))
    assert found['lungs_dice']['mean'] == pytest.approx(f1_score(is_lungs.ravel(), lungs.ravel() > 0.5))


def test_threshold_is_chosen_on_one_set_and_kept_on_another():
    shifted = measure(LESIONS / 4, MASKS)  # 0.9 and 0.4 become 0.225 and 0.1
    chosen = segmentation.choose_lesion_threshold([measure(LESIONS, MASKS)])
    assert chosen == 0.11
    found = segmentation.score_slices([shifted], chosen)
    assert found['dice']['mean'] == pytest.approx(2 * 1 / (3 + 2))  # .225, .15 and .125 are called
    assert found['best']['threshold'] == pytest.approx(0.03)
    assert found['best']['dice']['mean'] == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match='no slice with a lesion'):
        segmentation.choose_lesion_threshold([measure(LESIONS, MASKS * 0)])
    with pytest.raises(ValueError, match=r'0\.123'):
        segmentation.score_slices([shifted], 0.123)


def test_masks_that_do_not_exist_are_unknown_and_not_empty():
    only_lesion = segmentation.score_slices([measure(LESIONS, MASKS & LESION, known=LESION, lungs=1.0)], 0.4)
    assert only_lesion['dice']['n'] == only_lesion['auc']['n'] == 1
    for name in ('auc_in_lungs', 'grey_auc_in_lungs', 'lungs_dice', 'consolidation_dice', 'false_share'):
        assert only_lesion[name] == {'mean': None, 'low': None, 'high': None, 'n': 0}, name
    only_lungs = segmentation.score_slices([measure(LESIONS, MASKS & LUNGS, known=LUNGS, lungs=MASKS > 0)], 0.4)
    assert only_lungs['lungs_dice']['mean'] == 1
    assert only_lungs['best'] is None
    for name in ('dice', 'auc', 'pointing', 'false_share', 'dice_pooled'):
        assert only_lungs[name]['n'] == 0, name


def test_false_share_of_slices_without_lesions():
    free = np.minimum(MASKS, LUNGS)
    outlined = measure(LESIONS, free, patient='a')  # 4 of 8 pixels of lungs
    by_model = measure(LESIONS, free * 0, known=LESION, lungs=1.0, patient='b')  # 4 of 16
    without = measure(LESIONS, free * 0, lungs=0.0, patient='b')  # 4 more, and no lungs
    found = segmentation.score_slices([outlined, by_model, without, measure(LESIONS, MASKS, patient='c')], 0.4)
    assert found['false_share']['mean'] == pytest.approx(12 / (8 + 16 + 1))
    assert found['false_share']['low'] == pytest.approx(8 / 17)
    assert found['false_share']['high'] == pytest.approx(4 / 8)
    assert found['false_share']['n'] == 3
    clean = segmentation.score_slices([measure(0.0, free)], 0.4)
    assert clean['false_share']['mean'] == 0


def test_volumes_by_hand():
    spacing = (5.0, 20.0, 10.0)  # 1 ml a pixel
    slices = [
        measure(LESIONS, MASKS, volume='v', patient='a', spacing_mm=spacing),
        measure(LESIONS / 2, np.minimum(MASKS, 1), volume='v', patient='a', spacing_mm=spacing),  # one pixel of .45
        measure(LESIONS * 0, np.minimum(MASKS, 1), volume='v', patient='a', spacing_mm=spacing),
        measure(LESIONS / 4, MASKS, volume='w', patient='b', spacing_mm=(5.0, 20.0, 20.0)),
        measure(LESIONS, MASKS, volume='x', patient='b', known=LESION),
        measure(LESIONS, MASKS, patient='c'),
    ]
    found = segmentation.score_slices(slices, 0.4)
    v, w, x = found['volumes']
    assert v == {
        'name': 'v',
        'patient': 'a',
        'dice': pytest.approx(2 * 2 / (5 + 2)),
        'outlined_ml': pytest.approx(2),
        'predicted_ml': pytest.approx(5),
        'outlined_percent': pytest.approx(100 * 2 / 24),
        'predicted_percent': pytest.approx(100 * 5 / 24),
    }
    assert (w['outlined_ml'], w['predicted_ml'], w['dice']) == (pytest.approx(4), 0, 0)
    assert (x['outlined_ml'], x['predicted_percent'], x['dice']) == (None, None, pytest.approx(4 / 6))
    assert found['dice_pooled']['mean'] == pytest.approx((4 / 7 + 0 + 4 / 6) / 3)
    assert found['dice_pooled']['n'] == 3
    # Only v has slices of both kinds; the mean probability of the infected one is the highest.
    assert found['infected_slices_auc'] == {'mean': 1, 'low': None, 'high': None, 'n': 1}
    error = found['volume_error_ml']  # +3 and -4
    assert (error['mean'], error['n']) == (pytest.approx(-0.5), 2)
    assert (error['low'], error['high']) == (pytest.approx(-4), pytest.approx(3))
    assert error['limits'] == pytest.approx([-0.5 - 1.96 * 7 / 2**0.5, -0.5 + 1.96 * 7 / 2**0.5])
    assert found['volume_error_percent']['mean'] == pytest.approx((100 * 3 / 24 - 100 * 2 / 8) / 2)
    assert found['num_patients'] == 3
    alone = segmentation.score_slices(slices[:3], 0.4)['volume_error_ml']
    assert (alone['limits'], alone['low'], alone['mean']) == (None, None, pytest.approx(3))


def test_intervals_resample_patients():
    slices = [measure(LESIONS, MASKS, patient='a'), *[measure(LESIONS * 0, MASKS, patient='b')] * 3]
    found = segmentation.score_slices(slices, 0.4)['dice']
    assert found == {'mean': pytest.approx(2 / 3 / 4), 'low': 0, 'high': pytest.approx(2 / 3), 'n': 4}


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r'\(4, 4, 2\)'):
        segmentation.measure_slice(np.zeros((4, 4, 2)), GREY, ALL, GREY, patient='a')
    with pytest.raises(ValueError, match=r'\(5, 4\)'):
        segmentation.measure_slice(np.zeros((4, 4, 3)), np.zeros((5, 4), np.uint8), ALL, GREY, patient='a')


def test_probabilities_are_resized_about_pixel_centres():
    ramp = np.linspace(0, 1, 8, dtype=np.float16)[np.newaxis, :, np.newaxis].repeat(8, 0)
    large = resize_probabilities(ramp, (16, 32))
    assert large.dtype == np.float32
    assert large.shape == (16, 32, 1)
    # Pixel 4 i + k of a row lies at i + (k + .5) / 4 - .5 cells.
    expected = np.interp((np.arange(32) + 0.5) / 4 - 0.5, np.arange(8), ramp[0, :, 0])
    np.testing.assert_allclose(large[5, :, 0], expected, atol=1e-6)
