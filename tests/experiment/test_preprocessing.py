"""preprocessing.json alone, with numpy and Pillow, gives the bytes that the project prepares."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from covidjax.configs import att2, ct, lesions, lite, seq
from covidjax.data.lists import CLASSES
from covidjax.data.preprocess import load_slice
from covidjax.experiment.preprocessing import describe_preprocessing
from covidjax.models.att2 import normalise
from covidjax.models.ct_weights import prepare_images
from covidjax.models.lesion_weights import load_box


def describe(config, **fields):
    config = config.get_config().unlock()
    config.data.update(fields)
    return json.loads(json.dumps(describe_preprocessing(config, 'abc'), allow_nan=False))


def prepare(contract, grey, box):
    """Follows preprocessing.json: uint8 [H, W] -> uint8 [S, S]."""
    xmin, ymin, xmax, ymax = box
    height, width = grey.shape
    cut = grey[max(ymin, 0) : min(ymax, height), max(xmin, 0) : min(xmax, width)]
    resize = contract['resize']
    assert resize['library'] == 'Pillow'
    size = resize['width'], resize['height']
    return np.asarray(Image.fromarray(cut).resize(size, Image.Resampling[resize['filter']]))


def window(contract, hu):
    values = contract['window']
    shifted = (hu.astype(values['dtype']) - values['low_hu']).clip(0, values['width_hu'])
    return np.round(shifted * (255 / values['width_hu'])).astype(np.uint8)


@pytest.mark.parametrize('size', [48, 224])
def test_a_slice_prepared_from_the_file_alone_is_the_same(tmp_path, size):
    contract = describe(att2, image_size=size)
    rng = np.random.default_rng(0)
    for number, box in enumerate([(0, 0, 80, 60), (13, 7, 61, 59), (-5, -5, 90, 50)]):
        grey = rng.integers(0, 256, (60, 80), np.uint8)
        Image.fromarray(grey).save(tmp_path / f'{number}.png')
        ours = prepare(contract, grey, box)
        theirs = load_slice(str(tmp_path / f'{number}.png'), box, size)
        assert ours.tobytes() == theirs.tobytes()
        scaling = contract['scaling']
        scaled = ours.astype(scaling['dtype']) / scaling['std'] - scaling['mean'] / scaling['std']
        np.testing.assert_array_equal(scaled, np.asarray(normalise(theirs)))
    assert contract['classes'] == list(CLASSES)


def test_the_example_in_the_file_checks_window_crop_and_resize():
    contract = describe(att2, image_size=64)
    example = contract['hashes']['example']
    y, x = np.mgrid[: example['height'], : example['width']]
    hu = (37 * y + 91 * x) % 2000 - 1500
    assert example['hu'] == '(37 * y + 91 * x) mod 2000 - 1500, y and x from 0'
    prepared = prepare(contract, window(contract, hu), example['box'])
    assert hashlib.sha256(prepared.tobytes()).hexdigest() == example['sha256']
    shifted = prepare(contract, window(contract, hu + 10), example['box'])
    assert hashlib.sha256(shifted.tobytes()).hexdigest() != example['sha256']


def test_a_lesion_run_takes_whole_slices_and_gives_planes():
    contract = describe(lesions)
    assert contract['region'] == 'whole'
    assert contract['crop'] == {'rule': 'none: slices are taken whole'}
    assert contract['classes'] == ['lungs', 'lesion', 'consolidation']


def test_lungs_and_scans_are_stated():
    contract = describe(lite, region='lungs')
    assert contract['region'] == 'lungs'
    assert 'find_lungs_in_slice' in contract['crop']['lungs_of_images']
    assert contract['crop']['lesion_model']['digest'] == load_box().digest
    names = {'lungs', 'slice_lungs', 'preprocess'}
    assert set(contract['hashes']['sources']) == {f'covidjax/data/{name}.py' for name in names}
    assert describe(seq)['slices_of_a_scan'].startswith('16 of n')
    assert describe(seq, min_slices=1)['slices_of_a_scan'].startswith('all')
    assert describe(att2)['slices_of_a_scan'] == 'each on its own'


def test_the_window_and_the_axes_of_weights_that_have_seen_ct():
    scaling = describe(ct)['scaling']
    assert scaling['rule'].startswith('clip((grey / 255 * 1500 - 350) / 1200, 0, 1)')
    grey = np.random.default_rng(0).integers(0, 256, (5, 7)).astype(np.uint8)
    expected = np.clip((grey / np.float32(255) * 1500 - 350) / 1200, 0, 1)[::-1, ::-1].T
    np.testing.assert_allclose(prepare_images(normalise(grey)[None, :, :, None])[0, :, :, 0], expected, atol=1e-6)
    for words in ('rows and columns are reversed, then exchanged', 'features are turned back'):
        assert words in scaling['axes']
    assert describe(lite)['scaling']['rule'] == 'grey / std - mean / std, the same in every channel'
