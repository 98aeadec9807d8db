import json

import numpy as np
import pytest

from covidjax.configs import att2, lesions, lite, seq
from covidjax.data.preprocess import apply_window
from covidjax.errors import UserError
from covidjax.experiment.config import save_config
from covidjax.experiment.runs import Member, Run, create_lesion_run
from covidjax.models.lesion_weights import load_box
from covidjax.predict.ahead import Reader, plan_run, read_scan
from covidjax.predict.scan import create_recipe
from tests.scan_files import make_chest, write_images, write_series

HU = make_chest()
OPTIONS = {'series': None, 'force': False, 'masks': False, 'windows': 3}


def save(config, workdir):
    workdir.mkdir()
    save_config(workdir, config)
    return config


@pytest.mark.parametrize('windows', [1, 3])
@pytest.mark.parametrize('config', [att2, lite, seq])
def test_the_recipe_of_a_config_is_that_of_the_run(config, windows, tmp_path):
    config = save(config.get_config('/data'), tmp_path / 'run')
    sequence = {} if config.name == 'seq' else None
    run = Run(config, {}, {}, (Member(None, {}, sequence, None),))
    assert plan_run(tmp_path / 'run', windows) == create_recipe(run, windows)
    with_box = config.copy_and_resolve_references().unlock()
    with_box.lesions = 'box'
    save(with_box.lock(), tmp_path / 'with_box')
    expected = create_recipe(run._replace(config=with_box, lesions=load_box()), windows)
    assert plan_run(tmp_path / 'with_box', windows) == expected


def test_the_recipe_of_lesion_models(tmp_path):
    expected = create_recipe(create_lesion_run(load_box()), 3)
    assert plan_run(None, 3) == expected
    size = save(lesions.get_config('/data'), tmp_path / 'run').data.image_size
    assert plan_run(tmp_path / 'run', 3) == expected._replace(image_size=size, outline_size=size)


def test_another_process_reads_the_same(tmp_path):
    save(att2.get_config(), tmp_path / 'run')
    inputs = [write_series(tmp_path / 'a', HU), tmp_path / 'none', write_series(tmp_path / 'b', HU[::-1])]
    recipe = plan_run(tmp_path / 'run', 3)
    reader = Reader(tmp_path / 'run', inputs, **OPTIONS)
    first = reader.get(recipe)
    with pytest.raises(UserError, match='no such file or folder'):
        reader.get(recipe)
    assert reader.get(recipe._replace(image_size=99)) is None  # another recipe was followed
    assert reader.get(recipe) is None  # the end
    here = read_scan(inputs[0], None, recipe, force=False, with_slices=False)
    assert set(first.seconds) == set(here.seconds) == {'reading', 'preparing'}
    assert first.volume.sha256 == here.volume.sha256
    assert len(first.volume.slices) == 1
    np.testing.assert_array_equal(first.prepared.images, here.prepared.images)
    np.testing.assert_array_equal(first.prepared.views.images, here.prepared.views.images)


def test_a_reader_that_fails_leaves_the_work_to_the_caller(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'name': 'att2'}))
    assert Reader(tmp_path, [tmp_path], **OPTIONS).get(plan_run(None, 3)) is None


def test_what_is_refused_and_what_needs_a_model(tmp_path):
    flat = np.where(HU < -950, apply_window(HU), 237).astype(np.uint8)[:3]  # a body without lungs
    recipe = plan_run(None, 3)
    refused = read_scan(write_images(tmp_path / 'flat', flat), None, recipe, force=False, with_slices=False)
    assert isinstance(refused.prepared, UserError)
    assert refused.volume.sha256
    images = write_images(tmp_path / 'images', np.full((3, 64, 64), 9, np.uint8))
    lungs = recipe._replace(region='lungs')
    assert read_scan(images, None, lungs, force=False, with_slices=False).prepared is None
