import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from covidjax.configs import att2
from covidjax.data import covidx_ct
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.errors import UserError
from covidjax.experiment import common, features, slices
from covidjax.experiment.config import check_config
from covidjax.experiment.features import keep_features
from covidjax.models.att2 import Att2, normalise
from covidjax.models.torch_names import to_torch
from covidjax.training.checkpoints import open_checkpoints
from covidjax.training.loop import read_history
from tests.variables import draw_variables

SIZE = 32
FIELDS = {'stage_sizes': (1, 1), 'width': 4, 'block': 'basic', 'stem': 'small', 'tail_blocks': 1}


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw') / 'phantoms'
    write_phantoms(folder, PhantomOptions(num_train=3, num_val=3, num_test=3, image_size=64, max_slices=16))
    return folder


@pytest.fixture(scope='module')
def prepared(raw_dir):
    return covidx_ct.prepare(str(raw_dir), image_size=SIZE, prepared_dir=str(raw_dir.parent / 'prepared'))


@pytest.fixture
def data(prepared, tmp_path):
    """Returns the slices, with a folder for features of their own."""
    return prepared._replace(path=str(tmp_path / 'a' / 'b' / 'c'))


def create_config(raw_dir, tmp_path, **changes):
    """Returns a config that freezes random weights, which lie in a file."""
    config = att2.get_config(str(raw_dir)).unlock()
    config.data.image_size = SIZE
    config.model.update({**FIELDS, 'frozen': True, 'mirror': True, 'pretrained': str(tmp_path / 'w.safetensors')})
    config.train.update(batch_size=4, steps_per_epoch=5, num_epochs=2, learning_rate=0.01, augment='none')
    config.update_from_flattened_dict({name.replace('__', '.'): value for name, value in changes.items()})
    model = slices.create_model(config.model)
    tensors = to_torch(draw_variables(model, jnp.zeros((1, SIZE, SIZE, 1)), train=False, full=True))
    safetensors.numpy.save_file(tensors, tmp_path / 'w.safetensors')
    return config.lock()


def draw(model, seed=0):
    return draw_variables(model, jnp.zeros((1, SIZE, SIZE, 1)), train=False, full=True, seed=seed)


def count_computed(caplog):
    return [int(record.args[3]) for record in caplog.records if record.msg.startswith('features of')]


def test_features_are_computed_once_and_found_by_their_pixels(data, caplog):
    caplog.set_level(logging.INFO)
    model = Att2(**FIELDS, mirror=True)
    variables = draw(model)
    kept = keep_features(model, variables, SIZE, data, 'train')
    assert len(kept) == len(data.rows['train'])
    assert kept[2]['embedding'].dtype == np.float16
    assert kept[2]['label'] == data.rows['train'][2].label
    keep_features(model, variables, SIZE, data, 'train')
    # Another order and another split, as of a fold.
    order = [4, 0]
    fold = data._replace(
        rows={'val': [data.rows['train'][i] for i in order]},
        sources={'val': [data.sources['train'][i] for i in order]},
    )
    found = keep_features(model, variables, SIZE, fold, 'val')
    for i, number in enumerate(order):
        np.testing.assert_array_equal(found[i]['embedding'], kept[number]['embedding'])
    different = len({record['image'].tobytes() for record in data.sources['train']})
    assert count_computed(caplog) == [different, 0, 0]
    keep_features(model, draw(model, seed=1), SIZE, fold, 'val')  # another backbone
    keep_features(model.clone(mirror=False), variables, SIZE, fold, 'val')
    assert count_computed(caplog)[3:] == [2, 2]


def test_an_interrupted_computation_goes_on(data, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    model = Att2(**FIELDS)
    variables = draw(model)
    compute_rows = features._compute_rows

    def die(*arguments):
        for number, row in enumerate(compute_rows(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(features, '_compute_rows', die)
    with pytest.raises(KeyboardInterrupt):
        keep_features(model, variables, SIZE, data, 'val')
    folder = Path(data.path).parents[2] / 'covidjax_features'
    (path,) = folder.rglob('features.bin')
    with path.open('ab') as file:
        file.write(b'cut')  # a row that was not written to its end
    monkeypatch.setattr(features, '_compute_rows', compute_rows)
    kept = keep_features(model, variables, SIZE, data, 'val')
    first, second = count_computed(caplog)
    assert second == first - 3
    whole = data._replace(path=str(folder / 'elsewhere' / 'b' / 'c'))
    again = keep_features(model, variables, SIZE, whole, 'val')
    for i in range(len(kept)):
        np.testing.assert_array_equal(kept[i]['embedding'], again[i]['embedding'])


def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / 'covidjax_features').write_text('a file')
    with pytest.raises(UserError, match=r'choose another --config\.data\.prepared_dir'):
        keep_features(Att2(**FIELDS), draw(Att2(**FIELDS)), SIZE, data, 'val')


@pytest.mark.parametrize('compatibility', ['additive', 'tanh'])
def test_the_backbone_stays_and_the_rest_is_trained(raw_dir, tmp_path, data, compatibility):
    config = create_config(raw_dir, tmp_path, model__compatibility=compatibility, train__weight_decay=0.1)
    with open_checkpoints(tmp_path / 'run') as checkpoints:
        experiment = slices.create_experiment(config, data)
        common.fit(experiment, checkpoints, tmp_path / 'run')
        variables = jax.device_get(slices.restore_best(config, checkpoints))
    tensors = safetensors.numpy.load_file(tmp_path / 'w.safetensors')
    after = to_torch(variables)
    names = [name for name in tensors if not name.startswith(('attention', 'classifier', 'tail'))]
    assert any(name.endswith('running_mean') for name in names)
    for name in names:  # neither trained, nor decayed, nor moved by batch statistics
        np.testing.assert_array_equal(after[name], tensors[name])
    losses = [entry['train_loss'] for entry in read_history(tmp_path / 'run')]
    assert losses[1] < losses[0]
    # The whole network says the same as the kept features, up to half precision.
    images = np.stack([record['image'] for record in (data.sources['val'][i] for i in range(len(data.sources['val'])))])
    whole = experiment.slice_model.apply(variables, normalise(images), train=False).logits
    np.testing.assert_allclose(experiment.predict(variables, 'val').logits, whole, atol=5e-3)
    assert np.abs(whole).max() > 0.05


def test_the_optimizer_does_not_hold_the_backbone(raw_dir, tmp_path, data):
    config = create_config(raw_dir, tmp_path)
    experiment = slices.create_experiment(config, data)
    variables = draw(experiment.slice_model)
    optimizer = common.create_optimizer(
        lambda step: 0.1, weight_decay=0.1, decay='decoupled', is_frozen=experiment.is_frozen
    )
    params = variables['params']
    held = sum(np.size(leaf) for leaf in jax.tree.leaves(optimizer.init(params)))
    parts = [params[part] for part in ('attention1', 'attention2', 'classifier')]
    # Two moments of every trained number, and a few counters.
    assert 0 <= held - 2 * sum(np.size(leaf) for leaf in jax.tree.leaves(parts)) <= 4


def test_too_many_slices_are_pooled_and_a_resumed_run_stays_so(raw_dir, tmp_path, data, monkeypatch, caplog):
    config = create_config(raw_dir, tmp_path)
    assert slices.settle_pooling(config, data) is config
    monkeypatch.setattr(slices, 'MAX_BYTES', 1000)
    settled = slices.settle_pooling(config, data)
    assert settled.model.pooled
    assert not config.model.pooled
    assert 'only mean and maximum of every map are kept' in caplog.text
    (tmp_path / 'run').mkdir()
    common.save_config(tmp_path / 'run', settled)
    assert slices.adopt_pooling(config, tmp_path / 'run').model.pooled
    assert not slices.adopt_pooling(config, tmp_path / 'other').model.pooled


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train__augment': 'paper'}, r'model\.frozen=True computes features once, .* set train\.augment=none'),
        ({'model__pretrained': ''}, r'model\.frozen=True needs weights to freeze'),
        (
            {'model__pooled': True, 'model__compatibility': 'dot'},
            "no map for the global feature of compatibility 'dot'",
        ),
        ({'model__pretrained': 'astra'}, r'ResNet-152: it needs model\.stage_sizes=\[3, 8, 36, 3\] model\.width=64'),
    ],
)
def test_fields_that_do_not_fit(raw_dir, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        check_config(create_config(raw_dir, tmp_path, **changes))
