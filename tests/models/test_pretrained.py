import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from covidjax.errors import UserError
from covidjax.models.att2 import Att2
from covidjax.models.pretrained import find_weights, load_pretrained, torchvision_name
from tests.variables import draw_variables


@pytest.fixture(scope='module')
def variables():
    model = Att2(stage_sizes=(1, 2), width=4, tail_blocks=1)
    return draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)


def write_torchvision_file(variables, path, seed=1):
    """Writes a file with torchvision's names and layout for the backbone, and a classifier; returns its arrays."""
    rng = np.random.default_rng(seed)
    tensors = {'fc.weight': np.zeros((10, 32), np.float32), 'bn1.num_batches_tracked': np.zeros((), np.int64)}
    for collection in variables:
        for key, leaf in flatten_dict(variables[collection]['backbone'], sep='/').items():
            shape = leaf.shape
            if key.endswith('kernel'):
                height, width = shape[:2] if len(shape) == 4 else (1, 1)
                shape = (*shape[:-3:-1], height, width)
            tensors[torchvision_name(collection, key)] = rng.normal(size=shape).astype(np.float32)
    safetensors.numpy.save_file(tensors, path)
    return tensors


@pytest.mark.parametrize(
    ('collection', 'path', 'name'),
    [
        ('params', 'conv1/kernel', 'conv1.weight'),
        ('params', 'bn1/scale', 'bn1.weight'),
        ('batch_stats', 'bn1/var', 'bn1.running_var'),
        ('params', 'layer3_5/conv2/kernel', 'layer3.5.conv2.weight'),
        ('params', 'layer1_0/conv3/dense/kernel', 'layer1.0.conv3.weight'),
        ('params', 'layer2_0/downsample_conv/dense/kernel', 'layer2.0.downsample.0.weight'),
        ('batch_stats', 'layer2_0/downsample_bn/mean', 'layer2.0.downsample.1.running_mean'),
    ],
)
def test_names(collection, path, name):
    assert torchvision_name(collection, path) == name


def test_resnet50_has_the_arrays_of_torchvisions_file():
    shapes = jax.eval_shape(
        lambda key: Att2().init(key, jnp.zeros((1, 64, 64, 1)), train=False, full=True), jax.random.key(0)
    )
    names = {
        torchvision_name(collection, key)
        for collection in shapes
        for key in flatten_dict(shapes[collection]['backbone'], sep='/')
    }
    # torchvision's resnet50 state dict: 320 entries, 53 of them num_batches_tracked, 2 of the classifier.
    assert len(names) == 320 - 53 - 2
    assert {'layer4.2.bn3.running_var', 'layer1.0.downsample.0.weight', 'conv1.weight'} <= names


def test_every_backbone_array_is_filled_and_nothing_else(variables, tmp_path):
    tensors = write_torchvision_file(variables, tmp_path / 'w.safetensors')
    loaded = load_pretrained(variables, tmp_path / 'w.safetensors')
    np.testing.assert_array_equal(
        loaded['params']['backbone']['conv1']['kernel'][2, 3, 1, 0], tensors['conv1.weight'][0, 1, 2, 3]
    )
    np.testing.assert_array_equal(
        loaded['params']['backbone']['layer1_0']['conv3']['dense']['kernel'],
        tensors['layer1.0.conv3.weight'][:, :, 0, 0].T,
    )
    before, after = flatten_dict(variables, sep='/'), flatten_dict(loaded, sep='/')
    for key, value in before.items():
        assert np.array_equal(value, after[key]) == ('/backbone/' not in key), key


def test_loaded_weights_change_the_output(variables, tmp_path):
    model = Att2(stage_sizes=(1, 2), width=4, tail_blocks=1)
    write_torchvision_file(variables, tmp_path / 'w.safetensors')
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 1)).astype(np.float32)
    apply = jax.jit(functools.partial(model.apply, train=False))
    loaded = load_pretrained(variables, tmp_path / 'w.safetensors')
    loaded['batch_stats'] = variables['batch_stats']  # drawn variances may be negative
    assert np.abs(apply(loaded, image).logits - apply(variables, image).logits).max() > 1e-3


def test_differences_are_all_listed(variables, tmp_path):
    tensors = write_torchvision_file(variables, tmp_path / 'w.safetensors')
    tensors['extra.weight'] = tensors.pop('conv1.weight')
    tensors['bn1.bias'] = np.zeros(5, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / 'w.safetensors')
    with pytest.raises(UserError, match=r'missing conv1.weight; left over extra.weight; bn1.bias .* \(3 in all\)'):
        load_pretrained(variables, tmp_path / 'w.safetensors')


def test_damaged_file(variables, tmp_path):
    (tmp_path / 'w.safetensors').write_bytes(b'not weights')
    with pytest.raises(UserError, match='not a readable safetensors file'):
        load_pretrained(variables, tmp_path / 'w.safetensors')


def test_pickles_are_never_read(tmp_path):
    (tmp_path / 'resnet50.pth').write_bytes(b'')
    with pytest.raises(UserError, match='pickled'):
        find_weights(str(tmp_path / 'resnet50.pth'))


def test_missing_file_and_absent_repository(tmp_path):
    with pytest.raises(UserError, match='is not a file'):
        find_weights(str(tmp_path / 'none.safetensors'))
    with pytest.raises(UserError, match=r'resolve/main/model\.safetensors'):
        find_weights('timm/absent')  # tests are offline


def test_local_file_is_found(variables, tmp_path):
    path = tmp_path / 'w.safetensors'
    write_torchvision_file(variables, path)
    assert find_weights(str(path)) == path
